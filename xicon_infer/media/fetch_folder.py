"""The temporary folder of a job: private, removed with the job, found again after a crash."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "xicon-job-"
_LOCK = ".lock"


@contextmanager
def job_folder(root: Path) -> Iterator[Path]:
    """Yields a new empty folder that only this user may enter; removes it in every case.

    While it is in use it holds a locked file, and the system drops the lock of a process that
    ends, however it ends: that is how `clean_leftovers` tells leftovers.

    Args:
        root: where to make it; made if it is not there.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{_PREFIX}{secrets.token_hex(16)}"
    folder.mkdir(mode=0o700)
    try:
        with (folder / _LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clean_leftovers(root: Path) -> int:
    """Removes the folders of jobs whose process ended, and returns how many.

    Folders of other users, links, and whatever else is in `root` are left alone.
    """
    count = 0
    with suppress(OSError):  # no such folder: nothing is left over
        for folder in sorted(root.glob(f"{_PREFIX}*")):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                count += not folder.exists()
    return count


def _is_abandoned(folder: Path) -> bool:
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            return False
        with (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:  # killed between making the folder and locking it
        return True
    except OSError:  # locked: in use
        return False
    return True
