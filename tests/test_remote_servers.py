"""Proves that shards are read from S3, the Hub and the web, and that whatever a server does (falls silent, fails, hangs up,
loses a file) is tried again, and then costs the shard alone. Nothing here waits for ever: the tests have time limits."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import fsspec
import pytest
from fsspec.registry import _registry as REGISTRY
from helpers import pair, write_shard
from hub_server import HubServer

from hf_maskclip.data import remote, shards
from hf_maskclip.data.sources import open_files
from hf_maskclip.errors import ConfigError

needs_s3 = pytest.mark.skipif(find_spec("s3fs") is None, reason="s3fs is not installed: pip install -e '.[test]'")
needs_moto = pytest.mark.skipif(find_spec("moto") is None, reason="moto is not installed: pip install -e '.[test]'")
ROWS = [f"{name}{n}" for name in "ab" for n in range(6)]


class Handler(BaseHTTPRequestHandler):
    """Serves the files of a folder as the web and S3 do, whole or by ranges. Some answers fail, as often as `failures` say."""

    protocol_version = "HTTP/1.1"
    folder = Path()
    failures: dict[str, list] = {}  # name -> [how, how often]
    done: list[str] = []
    end = threading.Event()

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(200, self._content())

    def do_GET(self) -> None:
        name, content = Path(urlsplit(self.path).path).name, self._content()
        first, last = 0, len(content)
        if self.headers.get("Range"):
            first, last = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
            last = min(last + 1, len(content))
        how, times = self.failures.get(name, ["", 0])
        if not times:
            return self._answer(206, content, first, last)
        self.failures[name][1] -= 1
        self.done.append(how)
        if how in ("500", "503", "404"):
            return self._answer(int(how), b"")
        self._answer(206, content, first, last, until=(first + last) // 2)
        if how == "silent":
            self.end.wait(60)
        self.close_connection = True  # "hangs up": after a half

    def _content(self) -> bytes:
        file = self.folder / Path(urlsplit(self.path).path).name
        return file.read_bytes() if file.is_file() else b""

    def _answer(self, code: int, content: bytes, first: int = 0, last: int | None = None, until: int | None = None) -> None:
        last = len(content) if last is None else last
        self.send_response(code if content or code > 206 else 404)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first))
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[first : last if until is None else until])
            self.wfile.flush()


@pytest.fixture
def no_patience(monkeypatch) -> Iterator[None]:
    """Silence counts after a second, and nothing waits before it tries again."""
    monkeypatch.setattr(remote, "SILENT_SECONDS", 1)
    monkeypatch.setattr(shards, "_unreadable", shards.UnreadableShards())
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    remote.close_connections()
    yield
    remote.close_connections()


@pytest.fixture
def server(tmp_path, monkeypatch, no_patience) -> Iterator[str]:
    """A server of two tars and two parquet files of six pairs each; the address of the web, and S3's endpoint."""
    monkeypatch.setattr(Handler, "folder", tmp_path)
    monkeypatch.setattr(Handler, "failures", {})
    monkeypatch.setattr(Handler, "done", [])
    monkeypatch.setattr(Handler, "end", threading.Event())
    write_both_kinds(tmp_path)
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_address[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
    yield address
    Handler.end.set()
    remote.close_connections()
    served.shutdown()
    served.server_close()


def write_both_kinds(folder: Path) -> None:
    for name in "ab":
        write_shard(folder / f"{name}.tar", {f"{name}{n}": pair(n) for n in range(6)})
        rows = {"image": [pair(n)["png"] for n in range(6)], "text": [f"{name}{n}" for n in range(6)]}
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{name}.parquet")


def found_in(spec: str) -> list[str]:
    """Of each row its name; of one that stands for unreadable data the cause."""
    return [row.get("__error__") or row.get("text") or row["__key__"] for row in open_files(spec)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("how", ["silent", "500", "503", "hangs up", "404"])
@pytest.mark.parametrize("place", ["web", pytest.param("s3", marks=needs_s3)])
def test_whatever_a_server_does_is_tried_again_and_then_costs_that_shard_alone(place, how, kind, server, caplog):
    start = server if place == "web" else "s3://bucket"
    spec = f"{start}/{{a,b}}.{kind}"
    assert found_in(spec) == ROWS
    Handler.failures[f"a.{kind}"] = [how, 1]
    assert found_in(spec) == ROWS
    assert Handler.done == [how]
    Handler.failures[f"a.{kind}"] = [how, 1000]
    assert found_in(spec) == ["shard_unreadable", *ROWS[6:]]
    assert f"{start}/a.{kind}: the rest of this shard is unreadable" in caplog.text


@pytest.fixture
def bucket(tmp_path, monkeypatch, no_patience) -> Iterator[str]:
    """A bucket of moto's S3 server, with the files of both kinds."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://{}:{}".format(*server.get_host_and_port()))
    write_both_kinds(tmp_path)
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("pairs")
    for file in tmp_path.glob("?.*"):
        filesystem.put_file(str(file), f"pairs/shards/{file.name}")
    yield "s3://pairs/shards"
    remote.close_connections()
    server.stop()


@needs_s3
@needs_moto
@pytest.mark.slow
def test_s3_is_read_where_the_environment_says_it_is(bucket, caplog):
    for kind in ("tar", "parquet"):
        for names in ("{a,b}", "?", "[ab]"):
            assert found_in(f"{bucket}/{names}.{kind}") == ROWS
    assert found_in(f"{bucket}/{{a,c}}.tar") == [*ROWS[:6], "shard_unreadable"]
    assert "c.tar: the rest of this shard is unreadable (FileNotFoundError" in caplog.text
    with pytest.raises(ConfigError, match="no file matches|cannot be read"):
        open_files(f"{bucket}/nothing-*.tar")


READ = """
import sys, json
from hf_maskclip.data.sources import open_files
print(json.dumps({spec: [row["__key__"] for row in open_files(spec)] for spec in sys.argv[1:]}))
"""


@pytest.mark.slow
def test_shards_on_the_hub_are_read_by_their_paths(tmp_path):
    """In a new process, for the client reads its settings once, when it is imported."""
    write_both_kinds(tmp_path)
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_TOKEN": "hf_test"}
    start = "hf://datasets/org/pairs/train"
    tars, tables = f"{start}/{{a,b}}.tar", f"{start}/?.parquet"
    with HubServer() as hub:
        hub.repositories["datasets/org/pairs"] = {f"train/{file.name}": file.read_bytes() for file in tmp_path.glob("?.*")}
        environment = os.environ | settings | {"HF_ENDPOINT": hub.address}
        command = [sys.executable, "-c", READ, tars, tables]
        finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found[tars] == ROWS
    assert found[tables] == [f"{start}/{name}.parquet#{n}" for name in "ab" for n in range(6)]


@pytest.mark.parametrize(
    ("protocol", "package"),
    [("s3", "s3fs"), ("gs", "gcsfs"), ("gcs", "gcsfs"), ("abfs", "adlfs"), ("oss", "ossfs"), ("oci", "ocifs")],
)
@pytest.mark.parametrize("name", ["a.tar", "*.parquet"])
def test_a_client_that_is_absent_is_one_line_with_the_package_to_install(protocol, package, name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(REGISTRY, protocol, raising=False)
    spec = f"{protocol}://bucket/{name}"
    with pytest.raises(
        ConfigError, match=rf"^'{re.escape(spec)}': cannot be read \(ImportError: .*[Ii]nstall {package} "
    ) as error:
        open_files(spec)
    assert "\n" not in str(error.value)
