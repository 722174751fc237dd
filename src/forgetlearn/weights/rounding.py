"""Convert stored numbers to float32 and back in numpy, rounding once, and measure what rounding leaves of a change.

bfloat16 is the upper half of a float32; numpy does not know it, so its bits are shifted here. The results are those of
torch, bit for bit (nearest, ties to even), without the second and the 200 MB that importing torch takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
SURVIVES = 0.9  # the user is warned below it
# Read as unsigned integers without their sign bit, infinity is the largest number, and only NaN is above it.
UNSIGNED: dict[str, type[np.generic]] = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
INFINITY = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
NEAR_HALF, UPPER, ONE = np.uint32(0x7FFF), np.uint32(16), np.uint32(1)


class Scratch:
    """Buffers of one thread that are used again for every piece: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def array(self, name: str, n: int, dtype: type[np.generic]) -> Array:
        """Return `n` uninitialised numbers; the next call with this name gives the same memory."""
        n_bytes = n * np.dtype(dtype).itemsize
        if name not in self._buffers or len(self._buffers[name]) < n_bytes:
            self._buffers[name] = np.empty(n_bytes, np.uint8)
        return self._buffers[name][:n_bytes].view(dtype)


def wide(dtype: str) -> type[np.float32 | np.float64]:
    """Return the type in which tensors of a dtype are summed: float32, or float64 for float64."""
    return np.float64 if dtype == "F64" else np.float32


def widen(raw: Array, dtype: str, into: Array) -> None:
    """Convert stored bytes to numbers; `into` is float32 or float64."""
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

    Takes 0.2 s per GB on one core, and `scratch` memory of the size of `raw`.
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
    """Convert finite (or infinite) numbers to stored bytes, rounding once.

    With `random`, bfloat16 is rounded so that the mean is preserved: the lower half of each number is the chance,
    out of 65,536, of going one step away from zero.
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
    """Base of dataclasses whose fields are counts, sums and further `Sums`."""

    def add(self, other: Self) -> None:
        """Add another's fields to these."""
        for field in fields(self):
            own, more = getattr(self, field.name), getattr(other, field.name)
            if isinstance(own, Sums):
                own.add(more)
            else:
                setattr(self, field.name, own + more)


@dataclass
class Survival(Sums):
    """What the one rounding leaves of the intended change, over a sample of the numbers.

    seen     numbers in the sample
    wanted   those whose intended change is not 0
    changed  those whose stored number differs afterwards
    along    sum of intended x actual change; the actual change is that of the stored numbers
    squared  sum of intended x intended change
    """

    seen: int = 0
    wanted: int = 0
    changed: int = 0
    along: float = 0.0
    squared: float = 0.0

    def count(self, before: Array, change: Array, after: Array) -> None:
        """Count numbers before, their intended change, and numbers after; overwrites the last two arrays."""
        self.seen += before.size
        self.wanted += int(np.count_nonzero(change))
        done = np.subtract(after, before, out=after)
        self.changed += int(np.count_nonzero(done))
        largest = float(np.abs(change).max(initial=0))
        if largest > 0:  # squares of small changes would be 0 in float32
            change /= change.dtype.type(largest)
            done /= done.dtype.type(largest)
            self.along += float(np.dot(change, done)) * largest**2
            self.squared += float(np.dot(change, change)) * largest**2

    @property
    def share_changed(self) -> float | None:
        """The share of the numbers that should change and do; None if none should."""
        return self.changed / self.wanted if self.wanted else None

    @property
    def share_survived(self) -> float | None:
        """The actual change, projected on the intended one, over the intended one: 1 if rounding takes nothing."""
        return self.along / self.squared if self.squared else None

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the two shares and the size of the sample, for JSON."""
        return {"share_changed": self.share_changed, "share_survived": self.share_survived, "looked_at": self.seen}


def in_words(survival: Mapping[str, float | int | None]) -> str:
    """Return a sentence of `Survival.as_dict()`; empty if nothing was to change."""
    changed, survived, seen = survival["share_changed"], survival["share_survived"], survival["looked_at"]
    if changed is None or survived is None:
        return ""
    return (
        f"{100 * changed:.1f} % of the numbers that should change do, and {survived:.3f} of the wanted change survives "
        f"the rounding ({seen:,} numbers looked at)"
    )


def warning(survival: Mapping[str, float | int | None], remedies: str) -> str | None:
    """Return what to do if rounding takes more than a tenth of the change; None if it does not."""
    kept = survival["share_survived"]
    if kept is None or kept >= SURVIVES:
        return None
    return f"Rounding leaves {kept:.2f} of the wanted change. To keep it: {remedies}."
