"""Read changes to subtract from a checkpoint, piece by piece: another checkpoint's difference, or a saved vector.

`adapter_delta` has the third kind of change, a LoRA adapter. Each change lists the tensors of the base that it moves,
and computes the change of a range of one tensor's elements in float32 or float64, as they are summed. All names and
shapes are compared when a change is opened, before anything is written.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from forgetlearn.errors import ModelError, WeightMismatchError, some
from forgetlearn.weights.agreement import check_same, named_in, partners
from forgetlearn.weights.checkpoint_folder import FLOATS, WIDTHS, CheckpointFolder, Entry
from forgetlearn.weights.rounding import Array, Scratch, widen

VECTOR = "vector.safetensors"


class Change:
    """A change to a checkpoint, to be multiplied by a coefficient and subtracted.

    source   the tensors from which the change is read
    moved    maps each tensor of the base that is moved to its name in `source`
    made_on  hash (`digests.sha256_of`) of the only base that the change may be subtracted from; None for any base
    """

    made_on: str | None = None

    def __init__(self, source: CheckpointFolder, moved: dict[str, str]) -> None:
        self.source, self.moved = source, moved

    def fill(self, entry: Entry, start: int, base: Array, into: Array, scratch: Scratch) -> None:
        """Fill `into` with the change of a tensor's elements from `start` on; `base` holds the base's own elements."""
        read_wide(self.source, self.source.entries[self.moved[entry.name]], start, into, scratch)

    def close(self) -> None:
        """Close the files."""
        self.source.close()


class Difference(Change):
    """The change `tuned - base`. Both have the same architecture; shards, order and dtypes may differ.

    Raises:
        WeightMismatchError: names or shapes differ, or a tensor is floating-point on one side only.
    """

    def __init__(self, base: CheckpointFolder, tuned: str | Path) -> None:
        source = CheckpointFolder(tuned)
        refuse_quantised(source)
        found = partners(base, source)
        kinds = {name: (base.entries[name].dtype, source.entries[partner].dtype) for name, partner in found.items()}
        if odd := [name for name, (one, two) in kinds.items() if (one in FLOATS) != (two in FLOATS)]:
            first, second = kinds[odd[0]]
            whole = "tuned" if first in FLOATS else "base"
            raise WeightMismatchError(
                f"{len(odd)} of {len(found)} tensors are floating-point on one side and integers on the other: "
                f"{some(odd)} ({first} in base, {second} in tuned). Is {whole} quantised? Save it as bfloat16."
            )
        super().__init__(source, {name: found[name] for name, (dtype, _theirs) in kinds.items() if dtype in FLOATS})

    def fill(self, entry: Entry, start: int, base: Array, into: Array, scratch: Scratch) -> None:
        """Read elements of tuned and subtract those of the base."""
        super().fill(entry, start, base, into, scratch)
        np.subtract(into, base, out=into)


class SavedVector(Change):
    """A saved task vector: float32 tensors under its base's names, for that base or any model with the same shapes.

    Raises:
        WeightMismatchError: the vector names a tensor that the base lacks or has in another shape.
    """

    def __init__(self, base: CheckpointFolder, vector: str | Path) -> None:
        source = open_vector(vector)
        ours, theirs = base.shapes(), source.shapes()
        moved = named_in(theirs, base)
        check_same({partner: ours[name] for name, partner in moved.items()}, theirs, ("base", "vector"))
        if whole := [name for name in moved if base.entries[name].dtype not in FLOATS]:
            raise WeightMismatchError(f"The vector moves {some(whole)}, which hold integers in {base.folder}.")
        super().__init__(source, moved)


def read_wide(folder: CheckpointFolder, entry: Entry, start: int, into: Array, scratch: Scratch) -> None:
    """Fill `into` with a tensor's elements from `start` on, converted to its dtype; raise ModelError for NaN."""
    if entry.dtype == "F32" and into.dtype == np.float32:
        folder.read_numbers(entry, start, into.view(np.uint8), scratch)
        return
    raw = scratch.array("other", len(into) * WIDTHS[entry.dtype], np.uint8)
    folder.read_numbers(entry, start, raw, scratch)
    widen(raw, entry.dtype, into)


def check_change(name: str, base: Array, change: Array) -> None:
    """Raise ModelError if a change is not finite where the base is finite (a mask of -inf does not change)."""
    if not np.isfinite(np.dot(change, change)) and (~np.isfinite(change) & ~np.isinf(base)).any():
        raise ModelError(
            f"{name}: the difference is not finite. Did the training diverge? Look for infinite numbers in what is "
            "compared with the base."
        )


def open_vector(vector: str | Path) -> CheckpointFolder:
    """Open a saved vector, given its folder or file; its metadata record its origin."""
    folder = Path(vector)
    file = folder if folder.suffix == ".safetensors" else folder / VECTOR
    if not file.is_file():
        raise ModelError(f"{vector}: holds no {VECTOR}. Make one with forgetlearn vector.")
    found = CheckpointFolder.of_file(file)
    if found.metadata[file.name].get("forgetlearn") != "task vector":
        raise ModelError(f"{file}: was not written by forgetlearn vector.")
    return found


def refuse_quantised(folder: CheckpointFolder) -> None:
    """Raise ModelError if the config says that the weights are quantised."""
    if folder.config().get("quantization_config"):
        raise ModelError(
            f"{folder.folder}: is quantised (quantization_config in config.json). Quantised weights cannot be moved: "
            "use the checkpoint in bfloat16, float16 or float32 that it was made from."
        )
