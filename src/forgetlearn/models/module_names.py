"""Resolve names of a model's parts, such as `layers.0-3`, `mlp` or a pattern, to weights and their factors.

`modules` finds the parts of a model in memory. A checkpoint's names alone show only its layers and what patterns match.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from forgetlearn.errors import ConfigError, some

Modules = str | Sequence[str] | Mapping[str, float]
ALL = "all"
_LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?")


def own_name(name: str) -> str:
    """Return a parameter's name in the base, without the parts that an adapter's modules add."""
    return name.replace("base_model.model.", "").replace(".base_layer.", ".")


def factors_among(known: Mapping[str, list[str]], modules: Modules, setting: str) -> dict[str, float]:
    """Return the factor of every weight that `modules` names.

    `modules` is one name, several names, or a mapping from names to factors, which multiply the coefficient. A name is
    a key of `known` (`all` means all weights), a layer or range of layers such as `layers.4-7` (the last included), or
    a pattern with `*` and `?` over the names of weights. `attention@layers.0-3` means the weights that both names
    match.

    Raises:
        ConfigError: a name matches nothing, is listed twice, or two of them match the same weight.
    """
    found: dict[str, float] = {}
    owner: dict[str, str] = {}
    for name, factor in _as_mapping(modules, setting).items():
        for parameter in _matched(name, known, setting):
            if parameter in owner:
                is_tied = {owner[parameter], name} <= {"embeddings", "head", "vocabulary"}
                hint = ", since embeddings and head are one matrix in this model" if is_tied else ""
                raise ConfigError(
                    f"{setting}: {owner[parameter]!r} and {name!r} both match {parameter}{hint}. Name each weight once."
                )
            owner[parameter], found[parameter] = name, factor
    return found


def stored_groups(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the parts that can be found from the names of stored weights: all weights, and the layers.

    Layers are the numbered entries of the list that holds the most elements; `sizes` has each weight's number of
    elements.
    """
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in sizes:
        if found := re.match(r"(.*?)\.(\d+)\.", name):
            stacks.setdefault(found[1], {}).setdefault(int(found[2]), []).append(name)
    largest = max(stacks.values(), default={}, key=lambda layers: sum(sizes[n] for own in layers.values() for n in own))
    return {ALL: list(sizes)} | {f"layers.{index}": largest[index] for index in sorted(largest)}


def needs_structure(modules: Modules) -> bool:
    """Return True if a name is not `all`, a layer or a pattern, so that resolving it needs the model's structure."""
    parts = [part.strip() for name in _as_mapping(modules, "modules") for part in name.split("@")]
    return not all(part == ALL or _LAYERS.fullmatch(part) or set(part) & set("*?.") for part in parts)


def parse(text: str) -> dict[str, float] | tuple[str, ...]:
    """Parse the names of a flag: `mlp,head`, or with a factor each, `mlp=1.5,head=0.5`.

    Raises:
        ConfigError: only some names have a factor, a factor is not a number, or a name is listed twice.
    """
    pairs = [part.strip().partition("=") for part in text.split(",")]
    names = tuple(name.strip() for name, _equals, _factor in pairs)
    _check_once(names, "--modules")
    if not any(equals for _name, equals, _factor in pairs):
        return names
    try:
        return {name: float(factor) for name, (_name, _equals, factor) in zip(names, pairs, strict=True)}
    except ValueError:
        raise ConfigError(
            f"--modules {text}: expected names (mlp,head), or each with a number (mlp=1.5,head=1)."
        ) from None


def _as_mapping(modules: Modules, setting: str) -> dict[str, float]:
    if isinstance(modules, str):
        return {modules: 1.0}
    if isinstance(modules, Mapping):
        return dict(modules)
    _check_once(modules, setting)
    return dict.fromkeys(modules, 1.0)


def _check_once(names: Sequence[str], setting: str) -> None:
    if repeated := sorted({name for name in names if list(names).count(name) > 1}):
        raise ConfigError(f"{setting}: {some(repeated)} is listed more than once. Name each once.")


def _matched(name: str, known: Mapping[str, list[str]], setting: str) -> list[str]:
    """Return the parameters that a name matches; `a@b` matches those that both a and b match."""
    parts = [set(_one(part.strip(), known)) for part in name.split("@")]
    both = [parameter for parameter in known[ALL] if all(parameter in part for part in parts)]
    if not both:
        named = [group for group in known if not group.startswith("layers.")]
        n_layers = len(known) - len(named)
        raise ConfigError(
            f"{setting}: {name!r} matches nothing. There are {', '.join(named)}"
            + (f", layers.0 to layers.{n_layers - 1} (or layers.0-{n_layers - 1})" if n_layers else "")
            + f", and patterns over parameter names, such as {known[ALL][-1]!r}."
        )
    return both


def _one(name: str, known: Mapping[str, list[str]]) -> list[str]:
    if name in known:
        return known[name]
    if found := _LAYERS.fullmatch(name):
        first, last = int(found[1]), int(found[2] or found[1])
        return [p for index in range(first, last + 1) for p in known.get(f"layers.{index}", [])]
    return fnmatch.filter(known[ALL], name)
