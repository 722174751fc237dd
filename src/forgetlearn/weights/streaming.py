"""Compute with checkpoints one piece at a time, so that memory use does not grow with the model.

    theta' = theta - coef * change

Several threads each read a piece of a tensor, compute the result in float32, round it once and write it to its place
(numpy and file access release Python's lock). The results equal those of `task_vector.subtract` bit for bit.
`folder_arithmetic` adds folders and checks.
"""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from forgetlearn.errors import ModelError
from forgetlearn.weights.agreement import Shape
from forgetlearn.weights.checkpoint_folder import FLOATS, WIDTHS, CheckpointFolder, Entry, header_bytes
from forgetlearn.weights.deltas import Change, check_change
from forgetlearn.weights.rounding import Array, Scratch, Survival, narrow, wide, widen

PIECE = 1 << 17  # elements, so that a thread's data fit its core's cache
MOST_THREADS = 4  # more threads would only wait for memory
SAMPLED_PIECES = 32  # one piece in this many, and each tensor's first, is compared before and after
SPELLED = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Numbers:
    """Settings for how the result is stored.

    dtype     keep (each tensor's dtype in the base), float32 or bfloat16
    rounding  nearest, or stochastic, which preserves the mean; the same seed gives the same numbers
    """

    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0
    threads: int | None = None

    def stored(self, entry: Entry) -> str:
        """Return the dtype in which the result stores a tensor of the base."""
        return SPELLED.get(self.dtype, entry.dtype) if entry.dtype in FLOATS else entry.dtype


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of one flattened tensor, and the dtype, file and offset to write them with."""

    entry: Entry
    index: int
    start: int
    stop: int
    dtype: str
    file: int
    offset: int

    def write(self, raw: Array) -> None:
        """Write the bytes of the result."""
        view, done = raw.data, 0
        while done < len(view):
            done += os.pwrite(self.file, view[done:], self.offset + done)


def usual_threads() -> int:
    """Return the number of cores that this process may use, at most MOST_THREADS."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return min(MOST_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1)


class Work:
    """Subtracts a change piece by piece in several threads. Tensors without a coefficient are copied.

    The first error stops all threads. After `run`, `moved` has the names of the tensors with a nonzero change.
    """

    def __init__(self, base: CheckpointFolder, change: Change, coefs: Mapping[str, float], numbers: Numbers) -> None:
        self.base, self.change, self.coefs, self.numbers = base, change, coefs, numbers
        self.survival = Survival()
        self.moved: set[str] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, pieces: Iterator[Piece]) -> None:
        """Process all pieces."""
        n_threads = self.numbers.threads or usual_threads()
        with ThreadPoolExecutor(n_threads) as pool:
            futures = [pool.submit(self._take, pieces) for _ in range(n_threads)]
            try:
                for future in futures:
                    future.result()
            finally:
                self._stopped = True  # also after Ctrl-C

    def _take(self, pieces: Iterator[Piece]) -> None:
        survival, scratch = Survival(), Scratch()
        try:
            with np.errstate(all="ignore"):
                while not self._stopped:
                    with self._lock:
                        piece = next(pieces, None)
                    if piece is None:
                        break
                    self._do(piece, survival, scratch)
        except BaseException:
            self._stopped = True
            raise
        with self._lock:
            self.survival.add(survival)

    def _read(self, piece: Piece, scratch: Scratch) -> Array:
        raw = scratch.array("raw", (piece.stop - piece.start) * WIDTHS[piece.entry.dtype], np.uint8)
        self.base.read_numbers(piece.entry, piece.start, raw, scratch)
        return raw

    def _do(self, piece: Piece, survival: Survival, scratch: Scratch) -> None:
        entry, n, raw = piece.entry, piece.stop - piece.start, self._read(piece, scratch)
        coef = self.coefs.get(entry.name, 0)
        if coef == 0 and piece.dtype == entry.dtype:
            piece.write(raw)
            return
        numbers = scratch.array("numbers", n, wide(entry.dtype))
        widen(raw, entry.dtype, numbers)
        stored = scratch.array("stored", n * WIDTHS[piece.dtype], np.uint8)
        wanted = None
        if coef != 0:
            wanted = scratch.array("wanted", n, wide(entry.dtype))
            self.change.fill(entry, piece.start, numbers, wanted, scratch)
            np.multiply(wanted, wanted.dtype.type(coef), out=wanted)
            np.subtract(numbers, wanted, out=numbers)
            if entry.name not in self.moved and (np.abs(wanted) > 0).any():  # inf - inf is not a change
                self.moved.add(entry.name)
        if not math.isfinite(np.dot(numbers, numbers)):
            _keep_infinite(numbers, raw, entry, wanted)
        narrow(numbers, piece.dtype, stored, scratch, self._random(piece))
        if piece.dtype == "F16" and not np.isfinite(np.dot(v := stored.view(np.float16).astype(np.float32), v)):
            _refuse_overflow(stored, raw, entry)
        if wanted is not None and piece.index % SAMPLED_PIECES == 0:
            _count(survival, (raw, entry.dtype), wanted, (stored, piece.dtype), scratch)
        piece.write(stored)

    def _random(self, piece: Piece) -> np.random.Generator | None:
        """Return a generator seeded by this piece alone, or None to round to nearest.

        The result therefore depends on neither threads nor shards.
        """
        if self.numbers.rounding == "nearest" or piece.dtype != "BF16":
            return None
        seeds = (self.numbers.seed, zlib.crc32(piece.entry.name.encode()), piece.start)
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seeds)))


class VectorWork(Work):
    """Writes the change itself, in float32."""

    def _do(self, piece: Piece, survival: Survival, scratch: Scratch) -> None:
        entry, n, raw = piece.entry, piece.stop - piece.start, self._read(piece, scratch)
        numbers, wanted = scratch.array("numbers", n, np.float32), scratch.array("wanted", n, np.float32)
        widen(raw, entry.dtype, numbers)
        self.change.fill(entry, piece.start, numbers, wanted, scratch)
        check_change(entry.name, numbers, wanted)
        if not math.isfinite(np.dot(wanted, wanted)):
            np.copyto(wanted, 0, where=np.isinf(numbers))
        piece.write(wanted.view(np.uint8))


def _keep_infinite(numbers: Array, raw: Array, entry: Entry, wanted: Array | None) -> None:
    """Restore the base's infinite numbers (a stored mask); raise ModelError if any other number is not finite.

    Where the base has a mask, tuned is infinite too, so their difference is NaN; a saved vector holds 0.
    """
    before = np.empty_like(numbers)
    widen(raw, entry.dtype, before)
    infinite = np.isinf(before)
    if wanted is not None and (moved := infinite & (wanted != 0) & ~np.isnan(wanted)).any():
        raise ModelError(
            f"{entry.name}: {np.count_nonzero(moved)} numbers of the base are infinite, and the subtraction would "
            "change them. Is the base damaged?"
        )
    np.copyto(numbers, before, where=infinite)
    odd = ~np.isfinite(numbers) & ~infinite
    if odd.any():
        raise ModelError(
            f"{entry.name}: {np.count_nonzero(odd)} numbers of the result are not finite. Did the training diverge? "
            "Look for infinite numbers in what is subtracted."
        )


def _refuse_overflow(stored: Array, raw: Array, entry: Entry) -> None:
    before = np.empty(len(stored) // 2, np.float64)
    widen(raw, entry.dtype, before)
    if (np.isinf(stored.view(np.float16)) & ~np.isinf(before)).any():
        raise ModelError(f"{entry.name}: the result is too large for float16. Pass --dtype float32 or bfloat16.")


def _count(
    survival: Survival, base: tuple[Array, str], wanted: Array, result: tuple[Array, str], scratch: Scratch
) -> None:
    """Add what rounding did to `survival`.

    If the dtype changes, compare the result with the base rounded to the new dtype.
    """
    before = scratch.array("numbers", len(wanted), wanted.dtype.type)
    after = scratch.array("after", len(wanted), wanted.dtype.type)
    widen(*base, before)
    if base[1] != result[1]:
        rounded = np.empty_like(result[0])
        narrow(before, result[1], rounded, scratch)
        widen(rounded, result[1], before)
    widen(*result, after)
    survival.count(before, np.negative(wanted, out=wanted), after)


def pieces_of(shape: Shape) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of a flattened tensor's pieces: whole rows, or parts of a row that is longer than a piece."""
    n_entries, columns = math.prod(shape), shape[-1] if shape else 1
    if n_entries == 0:
        return
    step = PIECE // columns * columns if columns <= PIECE else PIECE
    row = n_entries if columns <= PIECE else columns
    for begin in range(0, n_entries, row):
        for start in range(begin, begin + row, step):
            yield start, min(start + step, begin + row)


def model_pieces(base: CheckpointFolder, folder: Path, numbers: Numbers, files: ExitStack) -> Iterator[Piece]:
    """Yield all pieces in the base's byte order; create each file, with its header, when its first piece is due."""
    for name in base.files:
        entries = [entry for entry in base.entries.values() if entry.file == name]
        dtypes = {entry.name: numbers.stored(entry) for entry in entries}
        header = base.header_of(name) if numbers.dtype == "keep" else header_bytes(entries, base.metadata[name], dtypes)
        yield from file_pieces(entries, dtypes, header, folder / name, files)


def file_pieces(
    entries: list[Entry], dtypes: Mapping[str, str], header: bytes, path: Path, files: ExitStack
) -> Iterator[Piece]:
    """Create a file with its header, and yield the pieces that fill it; `files` closes the file."""
    file = files.enter_context(path.open("xb", buffering=0))
    file.write(header)
    offset = len(header)
    file.truncate(offset + sum(entry.n_entries * WIDTHS[dtypes[entry.name]] for entry in entries))
    for entry in entries:
        dtype = dtypes[entry.name]
        for index, (start, stop) in enumerate(pieces_of(entry.shape)):
            yield Piece(entry, index, start, stop, dtype, file.fileno(), offset + start * WIDTHS[dtype])
        offset += entry.n_entries * WIDTHS[dtype]
