"""Convert stored numbers to float32 and back in numpy, rounding once, and measure how much of a change survives.

numpy has no bfloat16, which is the upper half of a float32, so its bits are shifted here. The results equal torch's bit
for bit (to nearest, ties to even), but torch, whose import takes a second and 200 MB, is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
SURVIVES = 0.9  # the user is warned if a smaller share survives
# Read as unsigned integers without the sign bit, finite numbers are less than infinity, and only NaN is greater.
UNSIGNED: dict[str, type[np.generic]] = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
INFINITY = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
NEAR_HALF, UPPER, ONE = np.uint32(0x7FFF), np.uint32(16), np.uint32(1)


class Scratch:
    """Buffers that one thread reuses for every piece, since allocating memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def array(self, name: str, n: int, dtype: type[np.generic]) -> Array:
        """Return `n` uninitialised numbers; the next call with this name returns the same memory."""
        n_bytes = n * np.dtype(dtype).itemsize
        if name not in self._buffers or len(self._buffers[name]) < n_bytes:
            self._buffers[name] = np.empty(n_bytes, np.uint8)
        return self._buffers[name][:n_bytes].view(dtype)


def wide(dtype: str) -> type[np.float32 | np.float64]:
    """Return the type in which tensors of a dtype are summed: float32, or float64 for float64."""
    return np.float64 if dtype == "F64" else np.float32


def widen(raw: Array, dtype: str, into: Array) -> None:
    """Convert stored bytes to numbers in `into`, which is float32 or float64."""
    stored = raw.view(STORED[dtype])
    if dtype != "BF16":
        np.copyto(into, stored, casting="unsafe")
        return
    bits = into.view(np.uint32) if into.dtype == np.float32 else np.empty(into.shape, np.uint32)
    np.copyto(bits, stored)
    np.left_shift(bits, UPPER, out=bits)
    if into.dtype != np.float32:
        np.copyto(into, bits.view(np.float32))


def odd_numbers(raw: Array, dtype: str, scratch: Scratch) -> Literal["", "infinite", "NaN"]:
    """Return "NaN" if the stored bytes contain NaN, else "infinite" if they contain infinity, else "".

    Takes 0.2 s per GB on one core, and as much memory in `scratch` as `raw` has.
    """
    if not len(raw):
        return ""
    bits = raw.view(UNSIGNED[dtype])
    magnitudes = scratch.array("unsigned", len(bits), UNSIGNED[dtype])
    largest = int(np.bitwise_and(bits, (1 << (8 * bits.itemsize - 1)) - 1, out=magnitudes).max())
    if largest < INFINITY[dtype]:
        return ""
    return "NaN" if largest > INFINITY[dtype] else "infinite"


def narrow(numbers: Array, dtype: str, raw: Array, scratch: Scratch, random: np.random.Generator | None = None) -> None:
    """Convert numbers, none of them NaN, to stored bytes, rounding once.

    With `random`, numbers are rounded to bfloat16 stochastically, which preserves the mean: the lower 16 bits of each
    float32, divided by 65,536, are the chance of rounding away from zero.
    """
    stored = raw.view(STORED[dtype])
    if dtype != "BF16":
        np.copyto(stored, numbers, casting="unsafe")
        return
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    step = scratch.array("step", len(bits), np.uint32)
    if random is None:
        np.right_shift(bits, UPPER, out=step)
        np.bitwise_and(step, ONE, out=step)
        np.add(step, NEAR_HALF, out=step)
    else:
        np.copyto(step, random.integers(0, 1 << 16, len(bits), dtype=np.uint16))
    np.add(step, bits, out=step)
    np.right_shift(step, UPPER, out=step)
    np.copyto(stored, step, casting="unsafe")


@dataclass
class Sums:
    """Base class of dataclasses whose fields are counts, sums or other `Sums`."""

    def add(self, other: Self) -> None:
        """Add each field of `other` to the same field of this object."""
        for field in fields(self):
            own, more = getattr(self, field.name), getattr(other, field.name)
            if isinstance(own, Sums):
                own.add(more)
            else:
                setattr(self, field.name, own + more)


@dataclass
class Survival(Sums):
    """Counts that show how much of the intended change survives rounding, on a sample of the numbers.

    seen     numbers in the sample
    wanted   numbers whose intended change is not 0
    changed  numbers that differ once stored
    along    sum of intended x actual change, with the actual change measured on the stored numbers
    squared  sum of intended x intended change
    """

    seen: int = 0
    wanted: int = 0
    changed: int = 0
    along: float = 0.0
    squared: float = 0.0

    def count(self, before: Array, change: Array, after: Array) -> None:
        """Count numbers before and after rounding, and their intended change. Overwrites `change` and `after`."""
        self.seen += before.size
        self.wanted += int(np.count_nonzero(change))
        done = np.subtract(after, before, out=after)
        self.changed += int(np.count_nonzero(done))
        largest = float(np.abs(change).max(initial=0))
        if largest > 0:  # otherwise squares of small changes are 0 in float32
            change /= change.dtype.type(largest)
            done /= done.dtype.type(largest)
            self.along += float(np.dot(change, done)) * largest**2
            self.squared += float(np.dot(change, change)) * largest**2

    @property
    def share_changed(self) -> float | None:
        """Of the numbers that should change, the share that do; None if none should."""
        return self.changed / self.wanted if self.wanted else None

    @property
    def share_survived(self) -> float | None:
        """The actual change, projected on the intended change, as a share of it: 1 if rounding loses nothing."""
        return self.along / self.squared if self.squared else None

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the two shares and the size of the sample, for JSON."""
        return {"share_changed": self.share_changed, "share_survived": self.share_survived, "looked_at": self.seen}


def in_words(survival: Mapping[str, float | int | None]) -> str:
    """Describe `Survival.as_dict()` in a sentence; return "" if nothing was to change."""
    changed, survived, seen = survival["share_changed"], survival["share_survived"], survival["looked_at"]
    if changed is None or survived is None:
        return ""
    return (
        f"{100 * changed:.1f} % of the numbers that should change do, and {survived:.3f} of the wanted change survives "
        f"the rounding ({seen:,} numbers looked at)"
    )


def warning(survival: Mapping[str, float | int | None], remedies: str) -> str | None:
    """Return a warning with `remedies` if rounding lost more than a tenth of the change, else None."""
    kept = survival["share_survived"]
    if kept is None or kept >= SURVIVES:
        return None
    return f"Rounding leaves {kept:.2f} of the wanted change. To keep it: {remedies}."
