"""Check that two sets of weights belong together, and pair their tensors, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from forgetlearn.errors import ConfigError, WeightMismatchError, some

Shape = tuple[int, ...]


class NamedTensors(Protocol):
    """Tensors with names and shapes. A tied tensor has more than one name."""

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of each tensor, without reading any data."""

    def twins(self, name: str) -> tuple[str, ...]:
        """Return the other names of a tensor."""


def check_coef(coef: float) -> None:
    """Raise ConfigError unless `coef` is a finite number of at least 0."""
    if not 0 <= coef < math.inf:
        raise ConfigError(f"coef = {coef}: must be a finite number >= 0. Give it without a minus: 0.3 subtracts.")


def partners(base: NamedTensors, other: NamedTensors) -> dict[str, str]:
    """Map the name of each tensor in `base` to its name in `other`; only a tied tensor's names may differ.

    Raises:
        WeightMismatchError: see `check_same`.
    """
    ours, theirs = base.shapes(), other.shapes()
    found = named_in(theirs, base)
    seen = {name: theirs[partner] for name, partner in found.items()}
    seen |= {name: theirs[name] for name in theirs if name not in ours and not ours.keys() & set(other.twins(name))}
    check_same(ours, seen, ("base", "tuned"))
    return found


def named_in(names: Mapping[str, object], weights: NamedTensors) -> dict[str, str]:
    """Map the name of each tensor of `weights` to whichever of its names is in `names`; skip tensors without one."""
    found = {}
    for name in weights.shapes():
        # Finding twins reads tensors, so it is done only if needed.
        match = name if name in names else next((twin for twin in weights.twins(name) if twin in names), None)
        if match is not None:
            found[name] = match
    return found


def check_same(base: Mapping[str, Shape], tuned: Mapping[str, Shape], sides: tuple[str, str]) -> None:
    """Raise WeightMismatchError unless both sides have the same names and shapes."""
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
