"""Proves that a run's folder has one writer at a time, and that a folder that cannot be written is found before anything is
read or built."""

import os
import socket
import stat

import pytest
from filelock import FileLock

from hf_maskclip.errors import ConfigError
from training import run as run_module
from training.saving.folder import FolderLock, check_output_dir, read_state, write_state


def test_a_second_run_in_a_folder_is_one_line_and_leaves_it_alone(run, tmp_path):
    folder = run(max_steps=1, checkpoint_every=1)[2]
    state = read_state(folder)
    assert (state["host"], state["pid"]) == (socket.gethostname(), os.getpid())
    before = (folder / "metrics.jsonl").read_text()
    with FileLock(folder / "run.lock"):
        for resume in ("none", "auto"):
            with pytest.raises(ConfigError, match=f"another run writes it \\(process {os.getpid()} on ") as error:
                run(max_steps=2, resume=resume)
            assert "\n" not in str(error.value)
    assert (folder / "metrics.jsonl").read_text() == before
    assert not (tmp_path / "run.1").exists()
    assert len(run(max_steps=2, resume="auto")[1]) == 2  # of a run that has ended nothing is left


def test_a_run_that_fails_leaves_its_folder_free(run, tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.training_step", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    FolderLock(tmp_path / "run").release()


def test_a_new_run_has_a_new_id_and_one_that_goes_on_keeps_it(tmp_path):
    ids = []
    for is_resumed in (False, True, False):
        write_state(tmp_path, is_resumed)
        ids.append(read_state(tmp_path)["tracker_id"])
    assert ids[0] == ids[1] != ids[2]
    assert ids[0].startswith(f"{tmp_path.name}-")


@pytest.mark.parametrize("where", ["file", "file/run", "file/deeper/run", "link"])
def test_a_folder_that_is_a_file_is_one_line_before_anything_is_read(where, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.setattr(run_module, "open_source", lambda *a, **k: pytest.fail("the data was opened"))
    with pytest.raises(ConfigError, match=f"output_dir='.*{where}': .*(file|link) is a file; give a folder") as error:
        run(output_dir=str(tmp_path / where))
    assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def refused(dir):
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(ConfigError, match=r"runs/new': .* cannot be written \(Read-only file system\)$"):
        check_output_dir(tmp_path / "runs" / "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\)$"):
        check_output_dir(tmp_path / "run")
    tmp_path.chmod(stat.S_IRWXU)


def test_looking_at_a_folder_leaves_nothing_behind(tmp_path):
    check_output_dir(tmp_path / "runs" / "new")
    assert list(tmp_path.iterdir()) == []
