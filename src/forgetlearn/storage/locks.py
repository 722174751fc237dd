"""Locks that allow one writer per run or cell. A lock is released when its process ends, even if it is killed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from forgetlearn.errors import RunError
from forgetlearn.runtime import processes
from forgetlearn.storage import disk, run_folder


@contextmanager
def claimed(lock: Path, *, waits: bool = False) -> Iterator[bool]:
    """Yield True if this process got the lock, and release the lock afterwards.

    If another process holds the lock, wait for it if `waits` is set; otherwise yield False. Raise RunError if the lock
    file cannot be written.
    """
    claim = FileLock(lock)
    with disk.naming(lock), suppress(Timeout):
        claim.acquire(blocking=waits)
    try:
        yield claim.is_locked
    finally:
        claim.release()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Create a folder and keep other processes from writing a run into it; remove the folder again if it stays empty.

    If a run has several processes (torchrun), the main one holds the lock for all. Raise RunError, naming the process,
    if another one is writing into the folder.
    """
    if not processes.is_main():
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with disk.naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock, holder = (folder / name for name in run_folder.LOCKS)
    try:
        with claimed(lock) as is_ours:
            if not is_ours:
                raise RunError(f"{folder} is in use by {_named(holder)}. Wait for it to finish, or stop it.")
            try:
                with suppress(RunError):  # on a full disk, the run itself reports what it could not write
                    disk.write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
                yield
            finally:
                for file in (holder, lock):
                    with suppress(OSError):  # Windows cannot delete an open file
                        file.unlink()
    finally:
        for path in made:
            with suppress(OSError):  # the folder is not empty
                path.rmdir()


def _named(holder: Path) -> str:
    try:
        who = disk.read_json(holder)
        return f"process {who['pid']} on {who['host']}"
    except (RunError, KeyError):  # it has the lock but has not written its id yet
        return "another process"
