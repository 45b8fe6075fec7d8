"""Proves that a run's folder has one writer at a time, that all processes have to see the same one, and that a folder that
cannot be written is found before anything is read or built."""

import os
import socket
import stat
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock
from processes import in_two_processes

from hf_maskclip.distributed import world_size
from hf_maskclip.errors import ConfigError
from training import run as run_module
from training.saving import folder as folder_module
from training.saving.checkpoint import check_all_see, latest_checkpoint
from training.saving.folder import FolderLock, check_is_shared, check_output_dir, read_state, write_state


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
    monkeypatch.setattr(run_module.Mix, "open", lambda config: pytest.fail("the data was opened"))
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


def go_on_in(folders: list[Path], rank: int) -> str:
    """What a process of two says that sees this folder where its run begins or goes on."""
    assert world_size() == 2
    folder_module.SECONDS_TO_APPEAR = 0
    check_all_see(latest_checkpoint(folders[rank]), folders[rank])
    if rank == 0:
        write_state(folders[rank], is_resumed=False)
    check_is_shared(folders[rank])
    return "went on"


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [("a", "b"), ("a",), ()])
def test_machines_that_do_not_share_a_folder_are_one_line_on_all_of_them(checkpoints, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    for name in checkpoints:
        (tmp_path / name / "checkpoints" / "step-00000003").mkdir(parents=True)
    a, b = tmp_path / "a", tmp_path / "b"
    message = "process 1 of step 0 (0: none); all machines need" if len(checkpoints) == 1 else "process 1 sees another folder"
    for line in in_two_processes(partial(go_on_in, [a, b]), tmp_path):
        assert line.startswith("output_dir='")
        assert message in line
        assert "\n" not in line
    (tmp_path / "init").unlink(missing_ok=True)
    assert in_two_processes(partial(go_on_in, [a, a]), tmp_path) == ["went on", "went on"]
