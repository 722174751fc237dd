"""The arithmetic of the method: difference, scale, subtract; tensor by tensor, in float32, rounded once.

task vector   tau    = tuned - base
forgetting    theta' = base - coef * tau
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from forgetlearn.errors import ConfigError, ModelError, WeightMismatchError, some

StateDict = Mapping[str, Tensor]


class Weights(Protocol):
    """Named tensors, read one at a time: a state dict or a checkpoint folder."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape, without reading any data."""

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU or where it is."""


@dataclass(frozen=True)
class InMemory:
    """Weights in a state dict."""

    tensors: StateDict

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def get(self, name: str) -> Tensor:
        """The tensor itself, not a copy."""
        return self.tensors[name].detach()


class Checkpoint:
    """Weights in a folder of safetensors, sharded or not; nothing is read until it is asked for.

    Raises:
        ModelError: there are no safetensors, or the index names a file that is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        missing = [name for name in names if not (self.folder / name).is_file()]
        if not names or missing:
            what = f"{index.name} names {some(missing)}, not there" if missing else "holds no .safetensors file"
            raise ModelError(f"{self.folder}: {what}. Pickled weights are not read: save with save_pretrained.")
        self.files = names
        self._file_of: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            with safe_open(self.folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    self._file_of[key] = name
                    self._shapes[key] = tuple(file.get_slice(key).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape, from the headers."""
        return dict(self._shapes)

    def get(self, name: str) -> Tensor:
        """One tensor, read from its file."""
        with safe_open(self.folder / self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def open_weights(source: StateDict | str | Path | Weights) -> Weights:
    """`source` as weights that are read one tensor at a time."""
    if isinstance(source, (str, Path)):
        return Checkpoint(source)
    if isinstance(source, Mapping):
        return InMemory(source)
    return source


def subtracted(
    base: StateDict | str | Path | Weights, tuned: StateDict | str | Path | Weights, coef: float
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of `base - coef * (tuned - base)`, one at a time, in the order of `base`.

    Each floating-point tensor is summed in float32 (float64 where base is) and rounded once to the dtype
    of `base`; other tensors are those of `base`. The inputs are left alone. `coef=0` gives the bits of
    `base`. Names and shapes are compared before the first tensor is given.

    Raises:
        WeightMismatchError: a name is missing on one side, or two shapes differ.
        ConfigError: coef is negative or not finite.
    Source: Ni et al. 2023, arXiv:2311.08011, eq. 3.
    """
    if not 0 <= coef < float("inf"):
        raise ConfigError(f"coef = {coef}: must be a finite number >= 0. Subtraction is built in: 0.3 forgets.")
    left, right = open_weights(base), open_weights(tuned)
    check_same(left.shapes(), right.shapes())
    return _moved(left, right, lambda start, end: start - coef * (end - start), skip=coef == 0)


def _moved(
    left: Weights, right: Weights, move: Callable[[Tensor, Tensor], Tensor], *, skip: bool
) -> Iterator[tuple[str, Tensor]]:
    for name in left.shapes():
        start = left.get(name)
        if skip or not start.is_floating_point():
            yield name, start.clone()
            continue
        wide = torch.float64 if start.dtype == torch.float64 else torch.float32
        end = right.get(name).to(start.device, wide)
        yield name, move(start.to(wide), end).to(start.dtype)


def subtract(base: StateDict, tuned: StateDict, coef: float) -> dict[str, Tensor]:
    """Weights moved away from what fine-tuning on the old facts added: `base - coef * (tuned - base)`.

    See `subtracted` for dtypes and errors; a worked example: base 1.0, tuned 1.5, coef 0.3 gives 0.85.
    """
    return dict(subtracted(base, tuned, coef))


@dataclass(frozen=True)
class TaskVector:
    """What fine-tuning added to each floating-point tensor, in float32; operators as in the paper's equations.

    `(v + w)`, `-v`, `0.3 * v` are vectors; `v.apply_to(base)` is base + v, and `(-0.3 * v).apply_to(base)`
    the forgetting of the method.
    Source: Ilharco et al. 2023, arXiv:2212.04089.
    """

    deltas: Mapping[str, Tensor]

    @classmethod
    def between(cls, base: StateDict | str | Path | Weights, tuned: StateDict | str | Path | Weights) -> TaskVector:
        """`tuned - base`, for two state dicts, checkpoint folders, or one of each.

        Raises:
            WeightMismatchError: a name is missing on one side, or two shapes differ.
        """
        left, right = open_weights(base), open_weights(tuned)
        check_same(left.shapes(), right.shapes())
        deltas = {}
        for name in left.shapes():
            start, end = left.get(name), right.get(name)
            if start.is_floating_point():
                deltas[name] = end.float() - start.float()
        return cls(deltas)

    def apply_to(self, base: StateDict | str | Path | Weights) -> dict[str, Tensor]:
        """`base + vector`, summed in float32 and rounded once to the dtype of `base`.

        Tensors that the vector does not name are those of `base`.

        Raises:
            WeightMismatchError: the vector names a tensor that `base` has not, or in another shape.
        """
        return dict(self.applied(base))

    def applied(self, base: StateDict | str | Path | Weights) -> Iterator[tuple[str, Tensor]]:
        """As `apply_to`, one tensor at a time."""
        weights = open_weights(base)
        shapes, own = weights.shapes(), InMemory(self.deltas).shapes()
        check_same({name: shapes[name] for name in own if name in shapes}, own, sides=("base", "vector"))
        for name in shapes:
            start = weights.get(name)
            delta = self.deltas.get(name)
            if delta is None:
                yield name, start.clone()
            else:
                yield name, (start.float() + delta.to(start.device)).to(start.dtype)

    def norm(self) -> float:
        """Euclidean length over all tensors."""
        return float(sum(float(delta.double().square().sum()) for delta in self.deltas.values()) ** 0.5)

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector({name: delta * factor for name, delta in self.deltas.items()})

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __add__(self, other: TaskVector) -> TaskVector:
        ours, theirs = InMemory(self.deltas).shapes(), InMemory(other.deltas).shapes()
        check_same(ours, theirs, sides=("left", "right"))
        return TaskVector({name: delta + other.deltas[name] for name, delta in self.deltas.items()})

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + -other


def check_same(
    base: Mapping[str, tuple[int, ...]],
    tuned: Mapping[str, tuple[int, ...]],
    sides: tuple[str, str] = ("base", "tuned"),
) -> None:
    """Nothing, if both have the same names and shapes.

    Raises:
        WeightMismatchError: how many differ, and the first five.
    """
    only_base = [name for name in base if name not in tuned]
    only_tuned = [name for name in tuned if name not in base]
    if only_base or only_tuned:
        sentences = [
            f"{len(names)} of {len(whole)} tensors are only in {side}: {some(names)}"
            for names, whole, side in ((only_base, base, sides[0]), (only_tuned, tuned, sides[1]))
            if names
        ]
        raise WeightMismatchError(f"{'; '.join(sentences)}. Are both of the same architecture?")
    differ = [name for name in base if base[name] != tuned[name]]
    if differ:
        listed = some([f"{name} {base[name]} and {tuned[name]}" for name in differ])
        raise WeightMismatchError(
            f"{len(differ)} of {len(base)} tensors differ in shape between {sides[0]} and {sides[1]}: {listed}. "
            "Was a token added before fine-tuning?"
        )


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy on the CPU of the model's parameters; tied ones once, under their first name."""
    return {name: weight.detach().cpu().clone() for name, weight in model.named_parameters()}


@torch.no_grad()
def load_into(model: torch.nn.Module, weights: Iterator[tuple[str, Tensor]] | Mapping[str, Tensor]) -> None:
    """Copy weights into the model's parameters of the same names, one at a time.

    Raises:
        WeightMismatchError: the names are not those of the model, or two shapes differ.
    """
    parameters = dict(model.named_parameters())
    loaded = set()
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise WeightMismatchError(f"{name} {tuple(tensor.shape)} does not fit the model.")
        parameters[name].copy_(tensor)
        loaded.add(name)
    missing = [name for name in parameters if name not in loaded]
    if missing:
        raise WeightMismatchError(f"{len(missing)} of {len(parameters)} tensors are missing: {some(missing)}.")
