"""Faults on purpose: a child process that is killed or whose writes fail, files that are damaged, and what is left.

Children are forked from a process that has done the same job once, so that one costs the job and no imports.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetlearn.errors import ForgetLearnError
from forgetlearn.report import plots
from forgetlearn.storage import digests, provenance, run_folder
from forgetlearn.training import callbacks

OK, REFUSED, CRASHED = 0, 2, 3
TIMED = {"seconds", "when", "peak_memory_gb", "sha256", "plan", "command"}  # differ between runs that did the same
NAMES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")  # audit events that change the disk


@dataclass
class Tally:
    """What was tried, by kind, and what was lost."""

    tried: dict[str, int] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)

    def add(self, kind: str, n: int = 1) -> None:
        self.tried[kind] = self.tried.get(kind, 0) + n

    @contextmanager
    def no_loss(self) -> Iterator[list[str]]:
        """A list for what this test loses: it fails at its end if there is anything, and all of it is counted."""
        lost: list[str] = []
        yield lost
        self.losses += lost
        assert not lost, "\n".join(lost)


@dataclass(frozen=True)
class Job:
    """Something to do under `place`, again and again with the same outcome: `place/out`.

    `inputs` must never change. `in_one_step`: there is the result, or what was there before, and nothing between.
    """

    name: str
    place: Path
    inputs: Path
    act: Callable[[], object]
    config: dict[str, object] | None = None
    in_one_step: bool = False

    def clear(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        (self.place / "neighbour.txt").write_text("not yours")

    def result(self) -> dict[str, bytes]:
        return contents(self.place)


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code or the negative number of its signal, and what it said."""

    code: int
    said: str


def contents(folder: Path) -> dict[str, bytes]:
    """Path to bytes of all files of a folder, hidden ones too; what tells times is left out of JSON."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _timeless(path) for path in files}


def _timeless(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name in (run_folder.MANIFEST, digests.HISTORY, run_folder.ARITHMETIC):
        return json.dumps(_without(json.loads(data), TIMED), sort_keys=True).encode()
    if path.name == digests.HASHES or path.parent.name == "seconds":  # of the manifest, say; of each step
        return b""
    return data


def _without(data: Any, names: set[str]) -> Any:
    if isinstance(data, dict):
        hashed = f"/{digests.HISTORY}"  # the hash of a file that tells times
        return {k: _without(value, names) for k, value in data.items() if k not in names and not k.endswith(hashed)}
    return [_without(value, names) for value in data] if isinstance(data, list) else data


def differences(found: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    """Names of files that are missing, too many, or other than wanted."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


# A child ------------------------------------------------------------------------------------------


def begin(act: Callable[[], object], log: Path) -> int:
    """Process id of a forked child that acts; what it prints goes to `log`."""
    gc.collect()
    gc.freeze()  # a child that collects its parent's objects spends most of its time on that
    child = os.fork()
    if child:
        return child
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(output), "w") for _ in range(2))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    code = CRASHED
    try:
        quick()
        act()
        code = OK
    except ForgetLearnError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = REFUSED
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def quick() -> None:
    """Leave out of this process what takes time and is made of other results; a checkpoint after every step."""
    provenance.commit = lambda: None
    plots.plot_scores = plots.plot_losses = lambda *_: None
    callbacks.TIMES_AS_LONG = 0


def ended(child: int, log: Path) -> Outcome:
    status = os.waitpid(child, 0)[1]
    return Outcome(os.waitstatus_to_exitcode(status), log.read_text(errors="replace")[-3000:])


def in_child(act: Callable[[], object], log: Path) -> Outcome:
    """How a child that does this ends."""
    return ended(begin(act, log), log)


def killed_after(act: Callable[[], object], log: Path, seconds: float) -> Outcome:
    """How a child ends that is killed so many seconds after it began, if it still runs."""
    child = begin(act, log)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child, log)


# Faults at a write --------------------------------------------------------------------------------


class Writes:
    """Counts what a process changes on the disk below a folder, and lets one of these fail, or all from one on.

    Seen are files opened to be written, names that are made, moved or removed, syncs, sizes, and files that
    safetensors writes by itself. `fault` is an errno, or None for SIGKILL just before it.
    """

    def __init__(self, below: Path, fail_at: int = 0, fault: int | None = None, *, stays: bool = False) -> None:
        self.below, self.fail_at, self.fault, self.stays = str(below), fail_at, fault, stays
        self.seen = 0

    def install(self) -> None:
        """From now on, and for good: only in a child."""
        import safetensors.torch

        sys.addaudithook(self._hook)
        for name in ("fsync", "ftruncate", "pwrite"):
            setattr(os, name, self._by_descriptor(getattr(os, name)))
        own = safetensors.torch.serialize_file

        def serialize_file(tensors: Any, filename: Any, **options: Any) -> Any:
            self._at(filename, in_rust=True)
            return own(tensors, filename, **options)

        safetensors.torch.serialize_file = serialize_file

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _mode, flags = args
            if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._at(os.fsdecode(path))
        elif event in NAMES and isinstance(args[0], (str, bytes, os.PathLike)):
            self._at(args[0], removes=event in ("os.remove", "os.rmdir"))

    def _by_descriptor(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            self._at(Path(f"/proc/self/fd/{descriptor}").readlink())
            return own(descriptor, *args)

        return call

    def _at(self, path: Any, *, removes: bool = False, in_rust: bool = False) -> None:
        if not os.fspath(path).startswith(self.below):
            return
        self.seen += 1
        is_now = self.seen == self.fail_at or (self.stays and 0 < self.fail_at <= self.seen)
        if not is_now:
            return
        if self.fault is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if removes and self.fault == errno.ENOSPC:
            return  # a full disk lets files go
        if in_rust:
            from safetensors import SafetensorError

            reason = f"{os.strerror(self.fault)} (os error {self.fault})"
            raise SafetensorError(f"Error while serializing: I/O error: {reason}")
        raise OSError(self.fault, os.strerror(self.fault), path)


def with_fault(job: Job, fail_at: int, fault: int | None, *, stays: bool = False) -> Callable[[], object]:
    """The job, in a process whose write number `fail_at` fails."""

    def act() -> None:
        Writes(job.place, fail_at, fault, stays=stays).install()
        job.act()

    return act


def count_writes(job: Job, log: Path) -> int:
    """How many writes an undisturbed run of the job does."""

    def act() -> None:
        writes = Writes(job.place)
        writes.install()
        job.act()
        print(f"\nwrites: {writes.seen}", flush=True)

    job.clear()
    outcome = in_child(act, log)
    assert outcome.code == OK, outcome.said
    return int(outcome.said.rsplit("writes: ", 1)[1])


# Damage -------------------------------------------------------------------------------------------


def cut(file: Path, draw: random.Random) -> None:
    """Shorten a file to a part of it."""
    os.truncate(file, draw.randrange(file.stat().st_size))


def flip(file: Path, draw: random.Random) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


DAMAGES = {"cut": cut, "flipped": flip}
