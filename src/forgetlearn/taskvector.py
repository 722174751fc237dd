"""The arithmetic of the method: difference, scale, subtract; tensor by tensor, in float32, rounded once.

task vector   tau    = tuned - base
forgetting    theta' = base - coef * tau
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from forgetlearn.errors import ConfigError, ModelError, WeightMismatchError, some

StateDict = Mapping[str, Tensor]
WHOLE, ADAPTER = "model.safetensors", "adapter_model.safetensors"


class Weights(Protocol):
    """Named tensors, read one at a time: a state dict or a checkpoint folder."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape, without reading any data."""

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU or where it is."""

    def tied(self) -> dict[str, tuple[str, ...]]:
        """Each name of a tensor that has several to all of them, in their order; no entry for the others."""


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

    def tied(self) -> dict[str, tuple[str, ...]]:
        """Names of one and the same memory, as `state_dict()` gives a tied head beside the embedding."""
        groups: dict[object, list[str]] = {}
        for name, tensor in self.tensors.items():
            if tensor.numel() and tensor.device.type != "meta":  # otherwise there is no memory to share
                place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                groups.setdefault(place, []).append(name)
        return {name: tuple(group) for group in groups.values() if len(group) > 1 for name in group}


class Checkpoint:
    """Weights in a folder of safetensors, sharded or not; nothing is read until it is asked for.

    Read is what transformers reads: `model.safetensors`, else the files of the index; a folder with
    neither may hold one other file of weights.

    Raises:
        ModelError: there are no safetensors, several without an index, or the index names a file that is
            not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = _weight_files(self.folder)
        self._file_of: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in self.files:
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

    def tied(self) -> dict[str, tuple[str, ...]]:
        """Nothing: transformers writes a tied tensor once, under one name."""
        return {}


def _weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the model of a folder."""
    if (folder / WHOLE).is_file():
        return [WHOLE]
    index = folder / f"{WHOLE}.index.json"
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [name for name in names if name not in found]:
            raise ModelError(f"{folder}: {index.name} names {some(missing)}, not there. Is the download complete?")
        return names
    names = [name for name in found if name != ADAPTER]
    if len(names) > 1:
        raise ModelError(
            f"{folder}: {len(names)} .safetensors files and no index: {some(names)}. Which hold the model is not "
            "known: save it with save_pretrained."
        )
    if not names and found:
        raise ModelError(f"{folder}: holds an adapter, not a whole model. Merge it, or make it with save_merged.")
    if not names:
        raise ModelError(
            f"{folder}: holds no .safetensors file. Pickled weights are not read: save with save_pretrained."
        )
    return names


def open_weights(source: StateDict | str | Path | Weights) -> Weights:
    """`source` as weights that are read one tensor at a time."""
    if isinstance(source, (str, Path)):
        return Checkpoint(source)
    if isinstance(source, Mapping):
        return InMemory(source)
    return source


def subtracted(
    base: StateDict | str | Path | Weights,
    tuned: StateDict | str | Path | Weights,
    coef: float,
    factors: Mapping[str, float] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of `base - coef * (tuned - base)`, one at a time, under the names and in the order of `base`.

    Each floating-point tensor is summed in float32 (float64 where base is) and rounded once to the dtype
    of `base`; other tensors are those of `base`. The inputs are left alone. `coef=0` gives the bits of
    `base`. With `factors` a tensor's coefficient is `coef` times its factor, and 0 where it has none. Names and
    shapes are compared before the first tensor is given. A tied tensor may have two names
    on one side, as in a state dict, and one on the other, as in a folder.

    Raises:
        WeightMismatchError: a name is missing on one side, two shapes differ, or what is tied in `base` is
            two different tensors in `tuned`.
        ConfigError: coef is negative or not finite.
    Source: Ni et al. 2023, arXiv:2311.08011, eq. 3.
    """
    if not 0 <= coef < float("inf"):
        raise ConfigError(f"coef = {coef}: must be a finite number >= 0. Subtraction is built in: 0.3 forgets.")
    left, right = open_weights(base), open_weights(tuned)
    partners = _partners(left, right)
    coefs = {name: coef * (1 if factors is None else factors.get(name, 0)) for name in partners}
    return _subtracted(left, right, partners, coefs)


def _subtracted(
    left: Weights, right: Weights, partners: Mapping[str, str], coefs: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    for name, partner in partners.items():
        start, coef = left.get(name), coefs[name]
        if coef == 0 or not start.is_floating_point():
            yield name, start.clone()
            continue
        wide = torch.float64 if start.dtype == torch.float64 else torch.float32
        start_wide, end = start.to(wide), right.get(partner).to(start.device, wide)
        yield name, (start_wide - coef * (end - start_wide)).to(start.dtype)


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
        """`tuned - base`, for two state dicts, checkpoint folders, or one of each; tied tensors once.

        Raises:
            WeightMismatchError: see `subtracted`.
        """
        left, right = open_weights(base), open_weights(tuned)
        deltas, ties = {}, left.tied()
        for name, partner in _partners(left, right).items():
            if name != ties.get(name, (name,))[0]:
                continue
            start, end = left.get(name), right.get(partner)
            if start.is_floating_point():
                deltas[name] = end.float() - start.float()
        return cls(deltas)

    def apply_to(self, base: StateDict | str | Path | Weights) -> dict[str, Tensor]:
        """`base + vector`, summed in float32 and rounded once to the dtype of `base`.

        Tensors that the vector does not name, under any of their names, are those of `base`.

        Raises:
            WeightMismatchError: the vector names a tensor that `base` has not, or in another shape, or moves
                what is tied in `base` in two ways.
        """
        return dict(self.applied(base))

    def applied(self, base: StateDict | str | Path | Weights) -> Iterator[tuple[str, Tensor]]:
        """As `apply_to`, one tensor at a time."""
        weights = open_weights(base)
        shapes, own = weights.shapes(), InMemory(self.deltas).shapes()
        check_same({name: shapes[name] for name in own if name in shapes}, own, sides=("base", "vector"))
        partners = _named_in(own, weights)
        _check_ties(weights, InMemory(self.deltas), partners, sides=("base", "vector"))
        for name in shapes:
            start = weights.get(name)
            if name in partners:
                yield name, (start.float() + self.deltas[partners[name]].to(start.device)).to(start.dtype)
            else:
                yield name, start.clone()

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


def _partners(base: Weights, tuned: Weights) -> dict[str, str]:
    """Each name of `base` with the name of the same tensor in `tuned`, which may be another one where it is tied.

    Raises:
        WeightMismatchError: see `subtracted`.
    """
    ours, theirs = base.shapes(), tuned.shapes()
    partners = _named_in(theirs, base)
    ties = tuned.tied()
    seen = {name: theirs[partner] for name, partner in partners.items()}
    seen |= {name: shape for name, shape in theirs.items() if not any(n in ours for n in ties.get(name, (name,)))}
    check_same(ours, seen)
    _check_ties(base, tuned, partners)
    return partners


def _named_in(names: Mapping[str, object], weights: Weights) -> dict[str, str]:
    """The names of `weights` that are among `names`, by themselves or by another name of the same tensor."""
    ties = weights.tied()
    found = ((name, [n for n in (name, *ties.get(name, ())) if n in names]) for name in weights.shapes())
    return {name: among[0] for name, among in found if among}


def _check_ties(
    base: Weights, other: Weights, partners: Mapping[str, str], sides: tuple[str, str] = ("base", "tuned")
) -> None:
    """Nothing, if what is one tensor in `base` is one, or two equal ones, in `other`.

    Raises:
        WeightMismatchError: it is two that differ: of the two results a tied model would keep the last.
    """
    for name, (first, *_more) in base.tied().items():
        mine, firsts = partners.get(name), partners.get(first)
        if mine != firsts and mine is not None and firsts is not None:
            one, two = other.get(mine), other.get(firsts)
            if one.dtype != two.dtype or not torch.equal(one, two):
                raise WeightMismatchError(
                    f"{name} is tied to {first} in {sides[0]}, but in {sides[1]} the two differ. "
                    "Is one of them a model with tied embeddings and the other without?"
                )


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
