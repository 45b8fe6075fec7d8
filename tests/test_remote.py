"""Proves that data on other machines is read by the addresses that people have, that a server which falls silent is not waited
for long, and that data workers leave the connections of their training process alone."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest
from helpers import pair, write_shard

from hf_maskclip.data import remote, shards
from hf_maskclip.data.sources import open_files, open_source
from hf_maskclip.errors import ConfigError
from training.data import loader


class Handler(BaseHTTPRequestHandler):
    """Serves the files of `folder` over connections that stay open. Of `silent` ones it sends a half, as often as they say."""

    protocol_version = "HTTP/1.1"
    folder = Path()
    silent: dict[str, int] = {}
    end = threading.Event()

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = urlsplit(self.path).path[1:]
        content = (self.folder / name).read_bytes() if (self.folder / name).is_file() else b""
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.silent.get(name):
            self.silent[name] -= 1
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.end.wait(30)
            return
        self.wfile.write(content)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[str]:
    """The address of a server of two shards of six pairs; a silent one is waited for for a second, a failed one not at all."""
    monkeypatch.setattr(Handler, "folder", tmp_path)
    monkeypatch.setattr(Handler, "silent", {})
    monkeypatch.setattr(Handler, "end", threading.Event())
    monkeypatch.setattr(remote, "SILENT_SECONDS", 1)
    monkeypatch.setattr(shards, "_unreadable", shards.UnreadableShards())
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", {f"{name}{n}": pair(n) for n in range(6)})
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_address[1]}"
    Handler.end.set()
    remote.close_connections()
    served.shutdown()
    served.server_close()


def keys_of(spec: str) -> list[str]:
    return [row.get("__error__") or row["__key__"] for row in open_files(spec)]


@pytest.mark.parametrize("signature", ["", "?token=a", "?X-Signature=a%2Fb*c[0]&X-Expires=60"])
def test_addresses_are_read_signed_ones_too(signature, server):
    assert keys_of(f"{server}/{{a,b}}.tar{signature}") == [f"{name}{n}" for name in "ab" for n in range(6)]


@pytest.mark.parametrize(("times", "is_lost"), [(1, False), (2, False), (9, True)])
def test_a_server_that_falls_silent_is_tried_again_and_then_counted(times, is_lost, server, caplog):
    Handler.silent["a.tar"] = times
    read = keys_of(f"{server}/a.tar::{server}/b.tar")
    named = [message for message in caplog.messages if message.startswith(f"{server}/a.tar: ")]
    assert len(named) == min(times, 4)
    assert all("Timeout" in message for message in named)  # the class of the error, for it may have no text
    assert [key for key in read if key[0] == "b"] == [f"b{n}" for n in range(6)]
    assert ("shard_unreadable" in read) == is_lost
    assert is_lost or read[:6] == [f"a{n}" for n in range(6)]


def test_the_web_and_s3_have_time_limits_and_a_long_download_has_none(tmp_path):
    assert remote.storage_options(str(tmp_path / "a.tar")) == remote.storage_options("gs://bucket/a.tar") == {}
    limits = remote.storage_options("s3://bucket/a.tar")["s3"]["config_kwargs"]
    assert limits == {"connect_timeout": 12, "read_timeout": 12, "retries": {"max_attempts": 0}}  # five times of s3fs
    timeouts = remote.storage_options("zip://a.tar::https://host/b.zip")["https"]["client_kwargs"]["timeout"]
    assert (timeouts.total, timeouts.sock_read, timeouts.sock_connect) == (None, 60, 60)


def test_no_connection_is_open_when_data_workers_are_forked(server):
    """A worker that dropped its copy of one would take it out of the event loop of the training process, too."""
    source = open_source(f"{server}/a.tar")
    assert len(list(source.captions(100))) == 6  # read to the end, so that the connection stays open for the next file
    session = fsspec.filesystem("http", **remote.storage_options(server)["http"])._session
    assert session.connector._conns
    states = []
    loader.start_workers(OpensAtOnce(lambda: states.append(session.closed)))
    assert states == [True]
    assert len(list(source.pairs())) == 6


class OpensAtOnce:
    """Stands for a data loader, and looks around when it would fork its workers."""

    def __init__(self, look: Callable[[], None]):
        self.look = look

    def __iter__(self):
        self.look()
        return iter(())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "{server}/folder/",
            r"an address must end in .tar, .*; of a folder name the files, as in {server}/folder/\{{000..099\}}",
        ),
        ("pipe:cat a.tar", "'pipe:cat a.tar': commands are not run; name the files, such as s3://bucket"),
        ("pipe:aws s3 cp s3://bucket/{{000..009}}.tar -", "commands are not run; name the files"),
        ("nothing://bucket/{{0..3}}.tar", r"cannot be read \(ValueError: Protocol not known"),
        ("{server}/absent/*.tar", r"cannot be read|no file matches"),
    ],
)
def test_what_is_not_read_is_one_line_that_leads_on(spec, message, server):
    with pytest.raises(ConfigError, match=message.format(server=server)) as error:
        open_files(spec.format(server=server))
    assert "\n" not in str(error.value)


def test_a_glob_on_another_machine_finds_its_files_with_a_question_mark_too():
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/shards/{n}.tar": b"" for n in range(3)})
    assert open_files("memory://shards/?.tar").num_shards == 3
    memory.rm("/shards", recursive=True)
