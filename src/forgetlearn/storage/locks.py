"""Locks that end with the process that holds them, however it dies: one writer for a run or a cell."""

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
    """Yield True if this process got the lock (it waits only with `waits`); raise RunError if the disk is full, say."""
    claim = FileLock(lock)
    with disk.naming(lock), suppress(Timeout):
        claim.acquire(blocking=waits)
    try:
        yield claim.is_locked
    finally:
        claim.release()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing a run into this folder, which is created; remove it again if it stays empty.

    Of several processes of one run (torchrun) the first holds the lock for all. Raise RunError, naming the process, if
    another one is writing there.
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
                with suppress(RunError):  # a full disk: let the run say what it could not write
                    disk.write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
                yield
            finally:
                for file in (holder, lock):
                    with suppress(OSError):  # Windows removes no open file
                        file.unlink()
    finally:
        for path in made:
            with suppress(OSError):  # it holds something
                path.rmdir()


def _named(holder: Path) -> str:
    try:
        who = disk.read_json(holder)
        return f"process {who['pid']} on {who['host']}"
    except (RunError, KeyError):  # it has the lock, and is about to write who it is
        return "another process"
