"""Strangers' JSON: every field of a file removed, or replaced by what cannot stand there, and what reads it is watched.

A case is one change of one field of one file, read by one reader. What a file holds of hashes of itself and of others
is made to fit again, so that the change is met and not its hash.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from forgetlearn.cli import main
from forgetlearn.errors import ForgetLearnError
from forgetlearn.storage import digests

SECONDS = 10  # of computing; a reader that takes longer hangs
SECONDS_OF_WAITING = 60  # the machine may have other things to do
Place = tuple[str | int, ...]
DEEP, QUITE_DEEP, DEEP_OBJECT = "<100,000 brackets>", "<600 brackets>", "<100,000 objects>"
NESTED = {DEEP: "[" * 100_000, QUITE_DEEP: "[" * 600 + "]" * 600, DEEP_OBJECT: '{"a":' * 100_000}
REMOVED = object()
VALUES: dict[str, Any] = {
    "removed": REMOVED,
    "null": None,
    "empty text": "",
    "text": "text",
    "digits": "1",
    "long text": "x" * 100_000,
    "half a character": "\ud800",
    "zero": 0,
    "number": 3,
    "negative": -1,
    "fraction": 0.5,
    "huge number": 10**400,
    "huge digits": "9" * 400,
    "large": 10**12,
    "largest float": 1.7e308,
    "not a number": float("nan"),
    "bool": True,
    "empty list": [],
    "list": [1, "a", None],
    "list in list": [[]],
    "empty object": {},
    "object": {"a": 1},
    "deep": DEEP,
    "quite deep": QUITE_DEEP,
    "deep object": DEEP_OBJECT,
}


class Hang(BaseException):
    """A reader takes too long. No Exception, which it may handle."""


@dataclass(frozen=True)
class Reader:
    """Something that reads a file: words of the command, in which `{root}` stands, or a function of the root."""

    name: str
    act: tuple[str, ...] | Callable[[Path], object]
    writes: tuple[str, ...] = ()  # below the root, what it may write; gone again before the next case

    def run(self, root: Path) -> int:
        """Its exit code; anything but an answer or an error of forgetlearn's own is raised."""
        if isinstance(self.act, tuple):
            if isinstance(main.app, typer.Typer):
                main.app = get_command(main.app)  # which typer makes anew for each call, in 0.15 s
            return main.main([word.format(root=root) for word in self.act])
        try:
            self.act(root)
        except ForgetLearnError as error:
            print(f"{type(error).__name__}: {error}")
            return 2
        return 0


@dataclass(frozen=True)
class Target:
    """A file below the root, where in it (the row of a JSONL file), and who reads it.

    `seal` makes hashes fit. `refused(place, value)`: must every reader named `strict` leave with 2?
    """

    file: str
    readers: tuple[Reader, ...]
    seal: Callable[[Path], None] | None = None
    row: int | None = None
    must_refuse: Callable[[Place, object], bool] = lambda _place, _value: False
    strict: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()  # names whose insides are not changed

    def load(self, root: Path) -> Any:
        text = (root / self.file).read_text(encoding="utf-8")
        return json.loads(text if self.row is None else text.splitlines()[self.row])

    def write(self, root: Path, text: str) -> None:
        file = root / self.file
        if self.row is not None:
            lines = file.read_text(encoding="utf-8").splitlines()
            lines[self.row] = text
            text = "\n".join(lines) + "\n"
        file.write_text(text, encoding="utf-8")
        if self.seal:
            with contextlib.suppress(Exception):  # what is nested too deeply has no hash either
                self.seal(root)


@dataclass(frozen=True)
class Case:
    """One change of one field for one reader."""

    target: Target
    reader: Reader
    place: Place
    value: str  # a name of VALUES

    def __str__(self) -> str:
        return f"{self.target.file} {'.'.join(map(str, self.place)) or '(all)'}: {self.value}; {self.reader.name}"


@dataclass
class Counts:
    """How cases ended."""

    read: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)


def places(data: Any, skip: Iterable[str] = (), place: Place = ()) -> Iterator[Place]:
    """Every place in JSON, the whole first; in lists the first three items."""
    yield place
    if place and place[-1] in skip:
        return
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list):
        items = enumerate(data[:3])
    for name, inner in items:
        yield from places(inner, skip, (*place, name))


def changed(data: Any, place: Place, value: object) -> str:
    """The JSON text with another value at a place."""
    whole = json.loads(json.dumps(data))
    if not place:
        whole = {} if value is REMOVED else value
    else:
        inner = whole
        for part in place[:-1]:
            inner = inner[part]
        if value is REMOVED:
            del inner[place[-1]]
        else:
            inner[place[-1]] = value
    text = json.dumps(whole)
    for mark, nested in NESTED.items():
        text = text.replace(json.dumps(mark), nested)
    return text


def cases(root: Path, targets: Iterable[Target]) -> list[Case]:
    """Every change of every field of the targets, each for one of the file's readers, in turn."""
    found = []
    for target in targets:
        changes = [(place, value) for place in places(target.load(root), target.skip) for value in VALUES]
        turns = itertools.cycle(target.readers)
        # One reader more after each round of values, or a value would always meet the same one.
        for number, (place, value) in enumerate(changes):
            if number % len(VALUES) == 0:
                next(turns)
            found.append(Case(target, next(turns), place, value))
    return found


def attempt(root: Path, case: Case, counts: Counts) -> None:
    """Change the file, read it, look at what came of it, and put everything back."""
    target, value = case.target, VALUES[case.value]
    original = target.load(root)
    kept = {file: file.read_bytes() for file in _touched(root, target)}
    try:
        target.write(root, changed(original, case.place, value))
        before = _state(root, case.reader.writes)
        code, said = _watched(case.reader, root)
        if isinstance(code, str):
            counts.lost.append(f"{case}: {code}")
            return
        counts.read += code == 0
        counts.refused += code == 2
        if code not in (0, 2):
            counts.lost.append(f"{case}: exit code {code}: {said[-300:]}")
        if code == 2 and (len(said.strip()) < 10 or said.strip().count("\n") > 6):
            counts.lost.append(f"{case}: says {said[:500]!r}")
        must_refuse = case.reader.name in target.strict and target.must_refuse(case.place, value)
        if code == 0 and must_refuse:
            counts.lost.append(f"{case}: was read as if nothing were wrong")
        after = _state(root, case.reader.writes)
        if wrote := sorted(path for path, state in after.items() if before.get(path) != state):
            counts.lost.append(f"{case}: wrote {wrote}")
        if gone := before.keys() - after.keys():
            counts.lost.append(f"{case}: removed {sorted(gone)}")
    finally:
        for file, data in kept.items():
            file.write_bytes(data)
        _clear(root, case.reader.writes)


def _touched(root: Path, target: Target) -> list[Path]:
    """The file, and those that hold hashes of it."""
    file = root / target.file
    near = [file.parent / name for name in ("manifest.json",)]
    return [file, *(path for path in near if path.is_file() and path != file)]


def _watched(reader: Reader, root: Path) -> tuple[int | str, str]:
    """Exit code and what was said; instead of the code the traceback, if there was one."""

    def too_long(*_: object) -> None:
        for clock, _seconds in clocks.values():
            signal.setitimer(clock, 0)  # the other one would end what tells of this
        raise Hang(f"took more than {SECONDS} s of computing, or {SECONDS_OF_WAITING} s")

    said = io.StringIO()
    clocks = {signal.SIGALRM: (signal.ITIMER_REAL, SECONDS_OF_WAITING), signal.SIGPROF: (signal.ITIMER_PROF, SECONDS)}
    own = {number: signal.signal(number, too_long) for number in clocks}
    for clock, seconds in clocks.values():
        signal.setitimer(clock, seconds)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return reader.run(root), said.getvalue()
    except (Exception, Hang):
        return "".join(traceback.format_exc().splitlines(keepends=True)[-12:]), said.getvalue()
    finally:
        for number, (clock, _seconds) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, own[number])


def _state(root: Path, left_out: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Path to size and time of change of every file below the root, but for what may be written."""
    found = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                place = f"{folder}{entry.name}"
                if place in left_out:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{place}/")
                else:
                    told = entry.stat()
                    found[place] = told.st_size, told.st_mtime_ns
    return found


def _clear(root: Path, written: tuple[str, ...]) -> None:
    import shutil

    for own in written:
        path = root / own
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("report.md", "report.html", "compare.json", "compare.md"):
            path.unlink(missing_ok=True)


# Hashes that fit ----------------------------------------------------------------------------------


def seal_chain(folder: str) -> Callable[[Path], None]:
    """Make the hash in a chain's file fit."""

    def seal(root: Path) -> None:
        file = root / folder / digests.HISTORY
        told = json.loads(file.read_text())
        if "updates" in told and isinstance(told.get("sha256"), str) and len(told["sha256"]) == 64:
            told["sha256"] = digests.hash_of(told["updates"])
            file.write_text(json.dumps(told))

    return seal


def seal_run(folder: str) -> Callable[[Path], None]:
    """Make the hashes of a run's results and of its manifest fit."""

    def seal(root: Path) -> None:
        file = root / folder / "manifest.json"
        told = json.loads(file.read_text())
        results = told.get("results")
        if isinstance(results, dict):
            for name in results:
                if (root / folder / name).is_file():
                    results[name] = digests.sha256_of(root / folder / name)
        if isinstance(told.get("sha256"), str) and len(told["sha256"]) == 64:
            del told["sha256"]
            told["sha256"] = digests.hash_of(told)
        file.write_text(json.dumps(told))

    return seal
