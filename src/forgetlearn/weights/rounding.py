"""Stored numbers to float32 and back, in numpy: one rounding, to the nearest or at random, and what it does.

bfloat16 is the upper half of a float32; numpy does not know it, so its bits are shifted. What comes out is
bit for bit what torch gives: the nearest, ties to even. So a checkpoint is worked on in little memory and
without the second that importing torch takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
SURVIVES = 0.9  # below it the user is warned
# As whole numbers without their sign, infinity is the largest of the numbers, and only NaN is above it.
BITS_OF: dict[str, tuple[Any, int]] = {
    "F64": (np.uint64, 0x7FF0 << 48),
    "F32": (np.uint32, 0x7F80 << 16),
    "F16": (np.uint16, 0x7C00),
}
BITS_OF["BF16"] = (np.uint16, 0x7F80)
NEAR_HALF, UPPER, ONE = np.uint32(0x7FFF), np.uint32(16), np.uint32(1)


class Scratch:
    """Memory of one thread that is used again for every piece: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def array(self, name: str, n: int, dtype: type[np.generic]) -> Array:
        """`n` numbers, not set; the same memory at the next call with this name."""
        n_bytes = n * np.dtype(dtype).itemsize
        if name not in self._buffers or len(self._buffers[name]) < n_bytes:
            self._buffers[name] = np.empty(n_bytes, np.uint8)
        return self._buffers[name][:n_bytes].view(dtype)


def wide(dtype: str) -> type[np.floating[Any]]:
    """In what numbers of this dtype are summed: float32, or float64 if they are."""
    return np.float64 if dtype == "F64" else np.float32


def widen(raw: Array, dtype: str, into: Array) -> None:
    """Stored bytes as numbers; `into` is float32 or float64."""
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
    kind, infinity = BITS_OF[dtype]
    if not len(raw):
        return ""
    bits = raw.view(kind)
    unsigned = scratch.array("unsigned", len(bits), kind)
    sign = 1 << (8 * bits.itemsize - 1)
    largest = int(np.bitwise_and(bits, kind(sign - 1), out=unsigned).max())
    if largest < infinity:
        return ""
    return "NaN" if largest > infinity else "infinite"


def narrow(numbers: Array, dtype: str, raw: Array, scratch: Scratch, random: np.random.Generator | None = None) -> None:
    """Finite (or infinite) numbers as stored bytes, rounded once.

    With `random`, bfloat16 is rounded so that the mean is kept: the lower half of each number is the chance,
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


class Sums:
    """Numbers that add up: a dataclass of counts, sums and further `Sums`."""

    def add(self, other: Self) -> None:
        """Take in what was counted elsewhere."""
        for field in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            own, more = getattr(self, field.name), getattr(other, field.name)
            if isinstance(own, Sums):
                own.add(more)
            else:
                setattr(self, field.name, own + more)


@dataclass
class Survival(Sums):
    """What the one rounding leaves of the wanted change, over the numbers that were looked at.

    seen     numbers looked at
    wanted   those whose wanted change is not 0
    changed  those whose stored number is another one afterwards
    along    sum of wanted x done; done is what the stored numbers show
    squared  sum of wanted x wanted
    """

    seen: int = 0
    wanted: int = 0
    changed: int = 0
    along: float = 0.0
    squared: float = 0.0

    def look(self, before: Array, change: Array, after: Array) -> None:
        """Count one piece: numbers before, the change that was wanted, numbers after; the last two are spoiled."""
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
        """Of the numbers that should change, the share that does; None where none should."""
        return self.changed / self.wanted if self.wanted else None

    @property
    def share_survived(self) -> float | None:
        """The change that was done, along the wanted one, over the wanted one: 1 where rounding takes nothing."""
        return self.along / self.squared if self.squared else None

    def as_dict(self) -> dict[str, float | int | None]:
        """The two shares and how many numbers they are of, for JSON."""
        return {"share_changed": self.share_changed, "share_survived": self.share_survived, "looked_at": self.seen}


def in_words(told: Mapping[str, Any]) -> str:
    """A sentence of `Survival.as_dict()`; empty where nothing was to change."""
    changed, survived, seen = told["share_changed"], told["share_survived"], told["looked_at"]
    if changed is None or survived is None:
        return ""
    return (
        f"{100 * changed:.1f} % of the numbers that should change do, and {survived:.3f} of the wanted change survives "
        f"the rounding ({seen:,} numbers looked at)"
    )


def warning(told: Mapping[str, Any], remedies: str) -> str | None:
    """What to do where rounding takes more than a tenth of the change; None where it does not."""
    kept = told["share_survived"]
    if kept is None or kept >= SURVIVES:
        return None
    return f"Rounding leaves {kept:.2f} of the wanted change. To keep it: {remedies}."
