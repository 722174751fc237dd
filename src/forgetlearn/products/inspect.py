"""Measure a change of weights: its size per layer and kind of module, and how much of it survives rounding.

The change is a saved vector, a run's product, an adapter, or a fine-tuned checkpoint. It is read one piece at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from forgetlearn.errors import ConfigError, WeightMismatchError
from forgetlearn.products.chain import Base, product_of
from forgetlearn.storage.disk import naming
from forgetlearn.storage.run_folder import RunFolder, is_run
from forgetlearn.weights.adapter_delta import Adapter
from forgetlearn.weights.checkpoint_folder import ADAPTER, WIDTHS, CheckpointFolder, Entry
from forgetlearn.weights.deltas import VECTOR, Change, Difference, SavedVector, check_change, open_vector
from forgetlearn.weights.rounding import Array, Scratch, Sums, Survival, narrow, wide, widen
from forgetlearn.weights.streaming import pieces_of, usual_threads

Key = TypeVar("Key")


@dataclass
class Tally(Sums):
    """Sums over one or more tensors: of the change, of the base if it is known, and of another change if given."""

    tensors: int = 0
    numbers: int = 0
    squared: float = 0.0
    base_squared: float = 0.0
    other_squared: float = 0.0
    along_other: float = 0.0
    survival: Survival = field(default_factory=Survival)

    def as_dict(self) -> dict[str, float | int | None]:
        """Return norms and shares; a value is None if it was not requested or is not defined.

        `norm` is the Euclidean norm of the change, `rms` its root mean square per number, and `relative` its norm
        divided by the norm of the base.
        """
        both = math.sqrt(self.squared * self.other_squared)
        return {
            "tensors": self.tensors,
            "numbers": self.numbers,
            "norm": math.sqrt(self.squared),
            "rms": math.sqrt(self.squared / self.numbers) if self.numbers else 0.0,
            "relative": math.sqrt(self.squared / self.base_squared) if self.base_squared else None,
            "share_changed": self.survival.share_changed,
            "share_survived": self.survival.share_survived,
            "cosine": self.along_other / both if both else None,
        }


@dataclass(frozen=True)
class Inspection:
    """Tallies of a change: the total, and parts by (layer, kind). The layer is None for tensors outside the layers."""

    what: str
    metadata: dict[str, str]  # of the file, if the change is a saved vector
    total: Tally
    parts: dict[tuple[int | None, str], Tally]

    def by_kind(self) -> dict[str, Tally]:
        """Return a tally for each kind of module, over all layers."""
        return _merged((kind, tally) for (_layer, kind), tally in self.parts.items())

    def by_layer(self) -> dict[int | None, Tally]:
        """Return a tally for each layer, over all kinds; the key None is for tensors outside the layers."""
        return _merged((layer, tally) for (layer, _kind), tally in self.parts.items())

    def as_dict(self) -> dict[str, Any]:
        """Return the inspection as data for JSON."""
        return {
            "what": self.what,
            "metadata": self.metadata,
            "total": self.total.as_dict(),
            "by_kind": {kind: tally.as_dict() for kind, tally in self.by_kind().items()},
            "by_layer": {str(layer): tally.as_dict() for layer, tally in self.by_layer().items()},
        }


def _merged(pairs: Iterable[tuple[Key, Tally]]) -> dict[Key, Tally]:
    found: dict[Key, Tally] = {}
    for key, tally in pairs:
        found.setdefault(key, Tally()).add(tally)
    return found


def inspect_change(
    what: str | Path,
    *,
    other: str | Path | None = None,
    base: str | Path | None = None,
    coef: float | None = None,
) -> Inspection:
    """Measure how large a change is and where it lies; with `coef`, also how much of it survives rounding.

    `what` and `other` are folders: a saved vector, a run (its product is measured), an adapter or a fine-tuned
    model. `base` is required with `coef`, and for all changes except a saved vector. If none is given and `what` is a
    run, the run's own base is used if it is still on this machine. With `coef`, rounding is measured on
    `base - coef * change`, stored in the base's dtypes. With `other`, the cosine of the two changes is measured.

    Raises:
        ConfigError: the base is required and not given, or `coef` is not finite.
        WeightMismatchError: the tensors of the base, the change and `other` do not match.
        ModelError: a checkpoint cannot be read; see `subtract_folders`.
    """
    if coef is not None and not math.isfinite(coef):
        raise ConfigError(f"coef = {coef}: must be a finite number.")
    base = base or _base_named_by(Path(what))
    if coef is not None and base is None:
        raise ConfigError("--coef needs --base: how much survives rounding depends on the base weights.")
    with ExitStack() as stack:
        vector = _vector_in(Path(what))
        if base is None and vector is None:
            raise ConfigError(f"{what}: is not a saved vector, so --base is needed to compute the change.")
        weights = stack.enter_context(CheckpointFolder(base) if base else open_vector(vector or ""))
        change = stack.enter_context(closing(_open(weights, what)))
        second = stack.enter_context(closing(_open(weights, other))) if other else None
        if second and not change.moved.keys() & second.moved.keys():
            raise WeightMismatchError(f"{what} and {other} have no changed tensor in common.")
        look = _Look(weights, change, second, coef, knows_base=base is not None)
        wanted = [
            entry for entry in weights.entries.values() if entry.name in change.moved or look.in_other(entry.name)
        ]
        with ThreadPoolExecutor(usual_threads()) as pool:
            tallies = list(pool.map(look.at, wanted))
    parts = _merged((place_of(entry.name), tally) for entry, tally in zip(wanted, tallies, strict=True))
    total = _merged((0, tally) for tally in tallies).get(0, Tally())
    metadata = next(iter(weights.metadata.values()), {}) if base is None else {}
    return Inspection(str(what), dict(metadata), total, parts)


@dataclass(frozen=True)
class _Look:
    """Measures single tensors of a change."""

    weights: CheckpointFolder
    change: Change
    other: Change | None
    coef: float | None
    knows_base: bool

    def in_other(self, name: str) -> bool:
        return self.other is not None and name in self.other.moved

    def at(self, entry: Entry) -> Tally:
        """Return the tally of one tensor."""
        tally, scratch = Tally(tensors=1, numbers=entry.n_entries), Scratch()
        with np.errstate(all="ignore"):
            for start, stop in pieces_of(entry.shape):
                self._piece(entry, start, stop - start, tally, scratch)
        return tally

    def _piece(self, entry: Entry, start: int, n: int, tally: Tally, scratch: Scratch) -> None:
        width = WIDTHS[entry.dtype]
        raw = scratch.array("raw", n * width, np.uint8)
        numbers, change = (scratch.array(name, n, wide(entry.dtype)) for name in ("numbers", "wanted"))
        self.weights.read_numbers(entry, start, raw, scratch)
        widen(raw, entry.dtype, numbers)
        change[:] = 0
        if entry.name in self.change.moved:
            self.change.fill(entry, start, numbers, change, scratch)
            check_change(entry.name, numbers, change)
        tally.squared += _dot(change, change)
        if self.knows_base:
            tally.base_squared += _dot(numbers, numbers)
        if self.other is not None and self.in_other(entry.name):
            second = scratch.array("second", n, wide(entry.dtype))
            self.other.fill(entry, start, numbers, second, scratch)
            check_change(entry.name, numbers, second)
            tally.other_squared += _dot(second, second)
            tally.along_other += _dot(change, second)
        if self.coef is not None:
            np.multiply(change, change.dtype.type(-self.coef), out=change)
            stored, after = scratch.array("stored", n * width, np.uint8), scratch.array("after", n, wide(entry.dtype))
            narrow(np.add(numbers, change, out=after), entry.dtype, stored, scratch)
            widen(stored, entry.dtype, after)
            tally.survival.count(numbers, change, after)


def _dot(one: Array, two: Array) -> float:
    """Return the dot product in float64, over finite products only: where a mask is -inf, its difference is NaN."""
    total = float(np.dot(one.astype(np.float64), two.astype(np.float64)))
    if math.isfinite(total):
        return total
    products = one.astype(np.float64) * two.astype(np.float64)
    return float(products[np.isfinite(products)].sum())


def place_of(name: str) -> tuple[int | None, str]:
    """Return a tensor's layer and kind of module: (3, "mlp.up_proj") for `model.layers.3.mlp.up_proj.weight`."""
    path = re.sub(r"\.weight$", "", name)
    found = re.search(r"(?:^|\.)(\d+)\.", path)
    return (int(found[1]), path[found.end() :]) if found else (None, path)


def _vector_in(folder: Path) -> Path | None:
    is_vector = folder.suffix == ".safetensors" or (folder / VECTOR).is_file()
    return folder if is_vector else None


def _base_named_by(folder: Path) -> Path | None:
    """Return the folder of the model that a run's product changes.

    This is the taught model if the run taught first, and the base otherwise. Return None if the folder holds no run,
    or the model is not on this machine.
    """
    if not is_run(folder):
        return None
    run = RunFolder.open(folder)
    if run.settings.teach.epochs == 0:
        return Base.of(run).folder()
    taught = folder / "taught"
    return taught if taught.is_dir() else None


def _open(base: CheckpointFolder, what: str | Path) -> Change:
    if vector := _vector_in(Path(what)):
        return SavedVector(base, vector)
    product = product_of(Path(what))
    return Adapter(base, product) if (product / ADAPTER).is_file() else Difference(base, product)


def plot_change(inspection: Inspection, file: Path) -> None:
    """Write an SVG plot of the change per number (rms) over the layers, with a line for each kind of module."""
    import matplotlib
    from matplotlib.figure import Figure

    kinds: dict[str, list[tuple[int, float]]] = {}
    for (layer, kind), tally in inspection.parts.items():
        if layer is not None and tally.squared:
            kinds.setdefault(kind, []).append((layer, math.sqrt(tally.squared / tally.numbers)))
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (kind, points) in enumerate(kinds.items()):
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", ms=3, lw=1.2, label=kind)
    axes.set_xlabel("layer")
    axes.set_ylabel("change of a number (rms)")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if kinds:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    with naming(file), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "change"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
