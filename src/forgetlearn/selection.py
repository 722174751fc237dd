"""Which weights forgetting acts on: names such as `embeddings` or `layers.0-3`, told from the model's structure.

Nothing here depends on what a model is called. A layer is an entry of the list of modules that holds the most weights;
attention is what has "attention" in its class's name in there, norms what has "norm", and the MLP (or whatever else a
layer is made of) the rest.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from torch import nn

from forgetlearn.errors import ConfigError, some
from forgetlearn.models import layer_list

Modules = str | Sequence[str] | Mapping[str, float]
ALL = "all"
_LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?")


def factors(model: nn.Module, modules: Modules, setting: str = "forget.modules") -> dict[str, float]:
    """The factor of every parameter that `modules` names; parameters that it does not name are left out.

    `modules` is one name, several, or names with a factor each (on top of the coefficient). A name is a part of the
    model (`groups` lists them), `layers.4` or `layers.4-7` (the last included), `all`, or a pattern with `*` and
    `?` over parameter names; `attention@layers.0-3` is what two names share.

    Raises:
        ConfigError: a name matches nothing, stands there twice, or two of them match the same parameter.
    """
    wanted = _as_mapping(modules, setting)
    known = groups(model)
    found: dict[str, float] = {}
    owner: dict[str, str] = {}
    for name, factor in wanted.items():
        for parameter in _matched(name, known, setting):
            if parameter in owner:
                raise ConfigError(
                    f"{setting}: {owner[parameter]!r} and {name!r} both match {parameter}"
                    f"{_tied(owner[parameter], name)}. Name each weight once."
                )
            owner[parameter], found[parameter] = name, factor
    return found


def groups(model: nn.Module) -> dict[str, list[str]]:
    """Names that `factors` knows for this model, each with the parameters that belong to it; no empty ones.

    `embeddings` are the input embeddings, `head` the output head: one and the same parameter where they are tied.
    `vocabulary` is both. Tied parameters have their first name.
    """
    names = {id(weight): _own_name(name) for name, weight in model.named_parameters() if ".lora_" not in name}
    found: dict[str, list[str]] = {ALL: list(names.values())}
    for name, module in (("embeddings", _ends(model)[0]), ("head", _ends(model)[1])):
        weights = module.parameters() if module is not None else ()
        found[name] = [names[id(weight)] for weight in weights if id(weight) in names]  # others are an adapter's
    found["vocabulary"] = list(dict.fromkeys([*found["embeddings"], *found["head"]]))
    for kind in ("attention", "mlp", "norms"):
        found[kind] = []
    for index, layer in enumerate(layer_list(model)[1]):
        own = {name: names[id(weight)] for name, weight in layer.named_parameters() if id(weight) in names}
        found[f"layers.{index}"] = list(own.values())
        for name, full in own.items():
            found[_kind(layer, name)].append(full)
    return {name: parameters for name, parameters in found.items() if parameters}


def _ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Input embeddings and output head, as transformers knows them."""
    own = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    first, last = (get() if get else None for get in own)
    return first, last


def _own_name(name: str) -> str:
    """A parameter's name in the base, where an adapter has put its own module around it."""
    return name.replace("base_model.model.", "").replace(".base_layer.", ".")


def _kind(layer: nn.Module, parameter: str) -> str:
    """What of a layer a parameter belongs to, by the classes of the modules that hold it, outermost first."""
    module, parts = layer, parameter.split(".")[:-1]
    classes = []
    for part in parts:
        module = getattr(module, part)
        classes.append(type(module).__name__.lower())
    if classes and "norm" in classes[-1]:
        return "norms"
    return "attention" if any("attention" in name or name.endswith("attn") for name in classes) else "mlp"


def _as_mapping(modules: Modules, setting: str) -> dict[str, float]:
    if isinstance(modules, str):
        return {modules: 1.0}
    if isinstance(modules, Mapping):
        return dict(modules)
    repeated = sorted({name for name in modules if list(modules).count(name) > 1})
    if repeated:
        raise ConfigError(f"{setting}: {some(repeated)} stands there more than once. Name each once.")
    return dict.fromkeys(modules, 1.0)


def _matched(name: str, known: Mapping[str, list[str]], setting: str) -> list[str]:
    """Parameters that a name stands for; `a@b` are those that both a and b stand for."""
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


def _tied(first: str, second: str) -> str:
    ends = {"embeddings", "head", "vocabulary"}
    return ", since embeddings and head are one matrix in this model" if {first, second} <= ends else ""
