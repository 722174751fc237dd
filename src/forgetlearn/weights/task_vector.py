"""Compute the method's arithmetic (difference, scaling, subtraction) tensor by tensor, in float32, rounding once.

task vector   tau    = tuned - base
forgetting    theta' = base - coef * tau
"""

from __future__ import annotations

import math
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from forgetlearn.errors import ModelError, WeightMismatchError, some
from forgetlearn.runtime import sharding
from forgetlearn.storage import disk
from forgetlearn.weights.agreement import NamedTensors, Shape, check_coef, check_same, named_in, partners
from forgetlearn.weights.checkpoint_folder import CheckpointFolder
from forgetlearn.weights.rounding import Array

SMALL_BYTES = 100_000_000  # smaller snapshots are kept in memory even if a folder is given
SAMPLED = 1 << 14  # numbers of a weight that are compared before and after rounding
StateDict = Mapping[str, Tensor]
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights(NamedTensors, Protocol):
    """Named tensors, read one at a time: a state dict or a checkpoint folder."""

    def get(self, name: str) -> Tensor:
        """Return one tensor: the tensor in memory itself, or one read from its file."""

    def tied(self) -> dict[str, tuple[str, ...]]:
        """Map each name of a tied tensor to all of its names, in order."""


@dataclass(frozen=True)
class InMemory:
    """Weights in a state dict. Names that share memory are tied, as the head and the embedding often are."""

    tensors: StateDict

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of each tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def twins(self, name: str) -> tuple[str, ...]:
        """Return the other names that share this tensor's memory."""
        return tuple(other for other in self.tied().get(name, ()) if other != name)

    def get(self, name: str) -> Tensor:
        """Return the tensor itself, not a copy."""
        return self.tensors[name].detach()

    def tied(self) -> dict[str, tuple[str, ...]]:
        """Map each name that shares memory to all names that share it."""
        groups: dict[object, list[str]] = {}
        for name, tensor in self.tensors.items():
            if tensor.numel() and tensor.device.type != "meta":  # otherwise there is no memory to share
                place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                groups.setdefault(place, []).append(name)
        return {name: tuple(group) for group in groups.values() if len(group) > 1 for name in group}


class Checkpoint(CheckpointFolder):
    """Weights in a folder of safetensors, as torch tensors; see `CheckpointFolder`."""

    def get(self, name: str) -> Tensor:
        """Read one tensor from its file."""
        with safe_open(self.folder / self.entries[name].file, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def tied(self) -> dict[str, tuple[str, ...]]:
        """Return {}: files store a tied tensor under one name, or as two equal tensors."""
        return {}


def open_weights(source: StateDict | str | Path) -> Weights:
    """Open a state dict or a folder as weights that are read one tensor at a time."""
    return InMemory(source) if isinstance(source, Mapping) else Checkpoint(source)


def subtracted(
    base: StateDict | str | Path,
    tuned: StateDict | str | Path,
    coef: float,
    factors: Mapping[str, float] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of `base - coef * (tuned - base)`, with the names and in the order of `base`.

    Each floating-point tensor is computed in float32 (float64 if it is float64 in `base`) and rounded once to its
    dtype in `base`. Other tensors and infinite numbers are copied from `base`; with `coef=0`, everything is. The
    inputs are not changed. With `factors`, a tensor's coefficient is `coef` times its factor, and a tensor without a
    factor is not changed. Names and shapes are compared before the first tensor is computed. A tied tensor may have
    two names on one side (in a state dict) and one on the other (in a folder).

    Raises:
        WeightMismatchError: a name is missing on one side, two shapes differ, or a tensor that is tied in `base` is
            two different tensors in `tuned`.
        ConfigError: coef is negative or not finite.
        ModelError: a result is not finite where the base is.
    Source: Ni et al. 2023, arXiv:2311.08011, eq. 3.
    """
    check_coef(coef)
    left, right = open_weights(base), open_weights(tuned)
    pairs = _checked_partners(left, right)
    coefs = {name: coef * (1 if factors is None else factors.get(name, 0)) for name in pairs}
    return _subtracted(left, right, pairs, coefs)


def _subtracted(
    left: Weights, right: Weights, pairs: Mapping[str, str], coefs: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    for name, partner in pairs.items():
        start, coef = left.get(name), coefs[name]
        if coef == 0 or not start.is_floating_point():
            yield name, start.clone()
            continue
        wide = torch.float64 if start.dtype == torch.float64 else torch.float32
        start_wide, end = start.to(wide), right.get(partner).to(start.device, wide)
        moved = (start_wide - coef * (end - start_wide)).to(start.dtype)
        masked = start.isinf()  # a mask holds -inf
        result = torch.where(masked, start, moved)
        if not is_finite(result) and not bool((result.isfinite() | masked).all()):
            raise ModelError(f"{name}: numbers of the result are not finite. Did the training diverge?")
        yield name, result


def subtract(base: StateDict, tuned: StateDict, coef: float) -> dict[str, Tensor]:
    """Return `base - coef * (tuned - base)`: the base, moved away from what fine-tuning on the old facts added.

    See `subtracted` for dtypes and errors. For example, base 1.0, tuned 1.5, coef 0.3 gives 0.85.
    """
    return dict(subtracted(base, tuned, coef))


@dataclass(frozen=True)
class TaskVector:
    """The change that fine-tuning made to each floating-point tensor, in float32, with the paper's operators.

    `v + w`, `v - w`, `-v` and `0.3 * v` are task vectors. `v.apply_to(base)` returns base + v, and
    `(-0.3 * v).apply_to(base)` forgets as the method does.
    Source: Ilharco et al. 2023, arXiv:2212.04089.
    """

    deltas: Mapping[str, Tensor]

    @classmethod
    def between(cls, base: StateDict | str | Path, tuned: StateDict | str | Path) -> TaskVector:
        """Return `tuned - base`, where each side is a state dict or a folder. A tied tensor appears once.

        Raises like `subtracted`.
        """
        left, right = open_weights(base), open_weights(tuned)
        deltas, ties = {}, left.tied()
        for name, partner in _checked_partners(left, right).items():
            if name != ties.get(name, (name,))[0]:
                continue
            start, end = left.get(name), right.get(partner)
            if start.is_floating_point():
                deltas[name] = end.float() - start.float()
        return cls(deltas)

    def apply_to(self, base: StateDict | str | Path) -> dict[str, Tensor]:
        """Return `base + vector`, summed in float32 and rounded once to the dtype of `base`.

        Tensors that the vector does not contain under any of their names are copied from `base`.

        Raises:
            WeightMismatchError: the vector names a tensor that `base` lacks or has in another shape, or gives
                the names of a tied tensor different changes.
        """
        weights, vector = open_weights(base), InMemory(self.deltas)
        shapes, own, sides = weights.shapes(), vector.shapes(), ("base", "vector")
        check_same({name: shapes[name] for name in own if name in shapes}, own, sides)
        moved = named_in(own, weights)
        _check_ties(weights, vector, moved, sides)
        found = {}
        for name in shapes:
            start = weights.get(name)
            delta = self.deltas[moved[name]] if name in moved else None
            found[name] = start.clone() if delta is None else (start.float() + delta.to(start.device)).to(start.dtype)
        return found

    def norm(self) -> float:
        """Return the Euclidean norm over all tensors."""
        return float(sum(float(delta.double().square().sum()) for delta in self.deltas.values()) ** 0.5)

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector({name: delta * factor for name, delta in self.deltas.items()})

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __add__(self, other: TaskVector) -> TaskVector:
        ours, theirs = InMemory(self.deltas).shapes(), InMemory(other.deltas).shapes()
        check_same(ours, theirs, ("left", "right"))
        return TaskVector({name: delta + other.deltas[name] for name, delta in self.deltas.items()})

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + -other


def _checked_partners(base: Weights, tuned: Weights) -> dict[str, str]:
    """Return `partners(base, tuned)`; raise WeightMismatchError if tensors tied in `base` differ in `tuned`."""
    found = partners(base, tuned)
    _check_ties(base, tuned, found, ("base", "tuned"))
    return found


def _check_ties(base: Weights, other: Weights, pairs: Mapping[str, str], sides: tuple[str, str]) -> None:
    """Raise WeightMismatchError if a tensor that is tied in `base` is two different tensors in `other`.

    A tied model would keep only the last of the two results.
    """
    for name, (first, *_more) in base.tied().items():
        mine, firsts = pairs.get(name), pairs.get(first)
        if mine != firsts and mine is not None and firsts is not None:
            one, two = other.get(mine), other.get(firsts)
            if one.dtype != two.dtype or not torch.equal(one, two):
                raise WeightMismatchError(
                    f"{name} is tied to {first} in {sides[0]}, but in {sides[1]} the two differ. "
                    "Does only one of the models have tied embeddings?"
                )


def is_finite(weight: Tensor) -> bool:
    """Return False if a floating-point tensor contains NaN or infinity. Takes 0.2 s per GB and makes no copy."""
    if not weight.is_floating_point() or weight.is_meta or not weight.numel():
        return True
    least, most = torch.aminmax(weight if weight.itemsize > 1 else weight.float())
    return math.isfinite(least) and math.isfinite(most)


def rounded(weight: Tensor, dtype: torch.dtype, seed: Sequence[object] | None = None) -> Tensor:
    """Convert a weight to another dtype, rounding to nearest; with `seed`, round to bfloat16 stochastically.

    Stochastic rounding preserves the mean: the lower 16 bits of each float32, divided by 65,536, are the chance of
    rounding away from zero.
    """
    if seed is None or dtype != torch.bfloat16:
        return weight.to(dtype)
    random = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))  # on the CPU: the same everywhere
    noise = torch.randint(0, 1 << 16, weight.shape, generator=random, dtype=torch.int32).to(weight.device)
    bits = weight.float().contiguous().view(torch.int32) + noise
    return bits.bitwise_and(-1 << 16).view(torch.float32).to(dtype)


def sample(weight: Tensor) -> Array:
    """Return evenly spaced numbers of a weight as float32 on the CPU, the same ones at every call."""
    flat = weight.detach().reshape(-1)
    found: Array = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].to("cpu", torch.float32, copy=True).numpy()
    return found


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copy the model's parameters to the CPU; a tied parameter is copied once, under its first name.

    For a sharded model, copy only this process's part.
    """
    return {name: weight.cpu().clone() for name, weight in sharding.parts(model).items()}


def snapshot_on_disk(model: torch.nn.Module, folder: Path | None) -> dict[str, Tensor]:
    """Return a read-only `snapshot` that, for a large float32 model, takes no memory until it is read.

    The numbers are in a file in `folder` (None: the system's temporary folder). The file's name is removed before this
    returns, so its space is freed together with the tensors, even if the process is killed.
    """
    weights = sharding.parts(model)
    sizes = [weight.numel() for weight in weights.values()]
    n_bytes = sum(sizes) * torch.float32.itemsize
    if n_bytes < SMALL_BYTES or any(weight.dtype != torch.float32 for weight in weights.values()):
        return snapshot(model)
    where = Path(tempfile.gettempdir()) if folder is None else folder
    with disk.naming(where):
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".base{disk.UNFINISHED}", dir=where) as file:
            for weight in weights.values():
                file.write(weight.detach().cpu().contiguous().view(-1).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, shared=False, size=sum(sizes), dtype=torch.float32)
    pieces = mapped.split(sizes)
    return {name: piece.view(weights[name].shape) for name, piece in zip(weights, pieces, strict=True)}


@torch.no_grad()
def load_into(model: torch.nn.Module, weights: Iterator[tuple[str, Tensor]] | Mapping[str, Tensor]) -> None:
    """Copy weights into the model's parameters, one at a time; in a sharded model, into this process's part.

    Raises:
        WeightMismatchError: a name or shape does not fit the model, or a parameter is missing.
    """
    parameters = sharding.parts(model)
    loaded = set()
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise WeightMismatchError(f"{name} {tuple(tensor.shape)} does not fit the model.")
        parameters[name].copy_(tensor)
        loaded.add(name)
    missing = [name for name in parameters if name not in loaded]
    if missing:
        raise WeightMismatchError(f"{len(missing)} of {len(parameters)} tensors are missing: {some(missing)}.")
