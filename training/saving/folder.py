"""The folder of a run: that it can be written, that one run at a time writes it, that all machines see the same one, and by
which id trackers know the run.

`run.lock` is locked as long as the run lasts, by the system, so that no crash leaves it locked. `run.json` says who holds it.
"""

import json
import os
import secrets
import socket
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_maskclip.distributed import gather_numbers
from hf_maskclip.errors import fail

LOCK, STATE = "run.lock", "run.json"
SECONDS_TO_APPEAR = 60  # in which a network file system shows all machines what one of them has written


def check_output_dir(output_dir: Path) -> None:
    """Raise a ConfigError where a run cannot write its folder, or another one is writing it. Leaves nothing behind."""
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        fail(f"output_dir={str(output_dir)!r}: {existing} is a file; give a folder or a new name")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        fail(f"output_dir={str(output_dir)!r}: {existing} cannot be written ({error.strerror})")
    if (output_dir / LOCK).exists():
        FolderLock(output_dir).release()


class FolderLock:
    """The one writer of a run's folder, until `release` or the end of the process.

    Raises:
        ConfigError: another run holds it; the message has its host and process.
    """

    def __init__(self, output_dir: Path):
        state = read_state(output_dir)
        self._lock = FileLock(output_dir / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            fail(
                f"output_dir={str(output_dir)!r}: another run writes it (process {state.get('pid')} on {state.get('host')}); "
                "end that one, or give another output_dir"
            )

    def release(self) -> None:
        self._lock.release()


def read_state(output_dir: Path) -> dict[str, Any]:
    """What `run.json` says; empty where there is none."""
    file = output_dir / STATE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_state(output_dir: Path, is_resumed: bool) -> None:
    """Note who writes the folder, and the run's id for trackers: a new one, or that of the run that goes on."""
    new = f"{output_dir.absolute().name}-{secrets.token_hex(4)}"
    tracker_id = read_state(output_dir).get("tracker_id", new) if is_resumed else new
    state = {"tracker_id": tracker_id, "host": socket.gethostname(), "pid": os.getpid()}
    partial = output_dir / f"{STATE}.partial"
    partial.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    partial.replace(output_dir / STATE)


def check_is_shared(output_dir: Path) -> None:
    """Raise a ConfigError on all processes where one does not see what the main process has just written by `write_state`.

    Each process writes its part of a checkpoint, and a run goes on from what all of them see.
    """
    file = output_dir / STATE
    written, deadline = gather_numbers(_checksum(file))[0], time.monotonic() + SECONDS_TO_APPEAR
    while _checksum(file) != written and time.monotonic() < deadline:
        time.sleep(1)
    for process, seen in enumerate(gather_numbers(_checksum(file))):
        if seen != written:
            fail(
                f"output_dir={str(output_dir)!r}: process {process} sees another folder there than process 0; "
                "all machines need a shared one, on one file system"
            )


def _checksum(file: Path) -> int:
    return zlib.crc32(file.read_bytes()) if file.is_file() else 0
