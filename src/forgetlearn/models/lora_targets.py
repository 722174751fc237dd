"""Decide which layers an adapter changes: only those that peft computes alike, merged and unmerged, and can load again.

peft refuses some layers, and takes some names for projections of fused experts (which are no modules) wherever they
occur. The classes alone do not tell which, so an adapter is tried on an outline of the model.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetlearn.errors import ConfigError
from forgetlearn.models.lora_layers import (
    NotAdaptable,
    adapted_layers,
    add_adapter,
    base_of,
    own_layer,
    plain_modules,
)
from forgetlearn.runtime.patterns import Pattern, problem
from forgetlearn.weights.adapter_files import ALL_LINEAR, AdapterConfig
from forgetlearn.weights.structure import outline

TRIED = "tried"  # the adapter's name on an outline
# What can be adapted, by name and by weight: several stages of a run ask about the same model.
_tried: dict[tuple[object, ...], tuple[list[str], list[str]]] = {}
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_READ_WHOLE = re.compile(r"self\.(\w+)\.weight\b(?!\[|\.(?:dtype|device|shape|size|data)\b| *=[^=])")


def targets_for(model: nn.Module, chosen: str | list[str]) -> tuple[str | list[str], list[str]]:
    """Return what peft needs to adapt the chosen modules: its target modules, and paths to be named by their weights.

    Raises:
        ConfigError: the pattern is invalid, or `all-linear` finds nothing.
    """
    if isinstance(chosen, str) and chosen != ALL_LINEAR:
        pattern = Pattern("lora.target_modules", chosen, chosen)
        if reason := problem([pattern], [path for path, _module in model.named_modules()]):
            raise ConfigError(f"{reason}.")
    named, by_weight = _adaptable(model)
    if chosen == ALL_LINEAR:
        if not named and not by_weight:
            raise ConfigError(f"lora.target_modules = {ALL_LINEAR}: peft adapts no linear layer of this model.")
        return named, by_weight
    config = AdapterConfig(peft_type="LORA", target_modules=chosen)
    found = [path for path, _module in plain_modules(base_of(model)) if by_weight and config.targets(path)]
    if any(path in by_weight for path in found):
        return [path for path in found if path not in by_weight], [path for path in found if path in by_weight]
    return chosen, []


def what_works(model: nn.Module) -> str:
    """Return a sentence for an error: the names that `target_modules` may list."""
    names = sorted({path.rsplit(".", 1)[-1] for paths in _adaptable(model) for path in paths})
    return f"It can be target_modules=[{','.join(names)}], or {ALL_LINEAR} for all of them." if names else ""


def check_layers(model: PeftModel, name: str) -> None:
    """Refuse what peft computes differently merged and unmerged: subtracting it would be silently wrong.

    Raises:
        ConfigError: the adapter changes an embedding, a tied weight, or what is no plain linear layer.
    """
    base = base_of(model)
    owners: dict[int, list[str]] = {}
    for path, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path.replace(".base_layer", ""))
    for path, layer in adapted_layers(model):
        if name not in layer.lora_A and name not in layer.lora_embedding_A:
            continue
        if isinstance(layer, LoraEmbedding):
            raise ConfigError(f"lora.target_modules matches {path}: an embedding is not supported. Leave it out.")
        if reason := _why_not(base, path, layer):
            raise NotAdaptable(f"lora.target_modules matches {path}: {reason}. Leave it out.")
        tied = owners[id(layer.get_base_layer().weight)]
        if len(tied) > 1:
            raise ConfigError(
                f"lora.target_modules matches {path}, whose weight is tied to another module "
                f"({', '.join(tied)}). Leave it out."
            )


def not_loaded(outlined: PeftModel, name: str) -> list[str]:
    """Return the factors that peft saves but cannot load again, since it renames some when loading."""
    saved = get_peft_model_state_dict(outlined, adapter_name=name, save_embedding_layers=False)
    return list(set_peft_model_state_dict(outlined, saved, adapter_name=name).unexpected_keys)


def have_plain_weights(base: nn.Module, paths: Sequence[str]) -> bool:
    """Return True if peft adapts the weights of these modules, named as parameters, as it adapts the modules."""
    layers = [own_layer(base.get_submodule(path)) for path in paths]
    return all(isinstance(layer, nn.Linear) and layer.weight.dtype in _PLAIN for layer in layers)


def _adaptable(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the paths of the linear layers that can be adapted, except the output head: by name, and by weight."""
    base = base_of(model)
    head = getattr(base, "get_output_embeddings", lambda: None)()
    wanted = [
        path
        for path, module in plain_modules(base)
        if isinstance(own_layer(module), (nn.Linear, Conv1D))
        and own_layer(module) is not head
        and not _why_not(base, path, module)
    ]
    key = (type(base), getattr(getattr(base, "config", None), "model_type", None), *wanted)
    if key not in _tried:
        _tried[key] = (wanted, []) if _is_adapted_alone(model, wanted) else _adapted_by_kind(model, wanted)
    return _tried[key]


def _adapted_by_kind(model: nn.Module, wanted: list[str]) -> tuple[list[str], list[str]]:
    """Return those of these paths that peft adapts, tried together if they differ only in a number."""
    alike: dict[str, list[str]] = {}
    for path in wanted:
        alike.setdefault(re.sub(r"\b\d+\b", "*", path), []).append(path)
    named: list[str] = []
    by_weight: list[str] = []
    for paths in alike.values():
        if _is_adapted_alone(model, paths):
            named += paths
        elif have_plain_weights(base_of(model), paths) and _is_adapted_alone(model, [], paths):
            by_weight += paths
    return named, by_weight


def _is_adapted_alone(model: nn.Module, named: list[str], by_weight: Sequence[str] = ()) -> bool:
    """Return True if an adapter on these paths changes these modules and nothing else, and peft loads what it saves."""
    config = LoraConfig(r=1, target_modules=named, task_type=TaskType.CAUSAL_LM)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            adapted = add_adapter(outline(model), config, TRIED, named, by_weight)
    except ConfigError:
        return False
    reached = {path: layer for path, layer in adapted_layers(adapted) if TRIED in layer.lora_A}
    if reached.keys() != {*named, *by_weight} or any(isinstance(layer, ParamWrapper) for layer in reached.values()):
        return False
    return not not_loaded(adapted, TRIED)


def _why_not(base: nn.Module, path: str, module: nn.Module) -> str | None:
    """Return why LoRA on a module would differ merged and unmerged; None if it is exact."""
    own, (owner, _dot, name) = own_layer(module), path.rpartition(".")
    kind = type(own).__name__
    if isinstance(module, ParamWrapper):
        return f"{module.parameter_name} of it holds several matrices in one tensor, or those of a router ({kind})"
    if not isinstance(own, (nn.Linear, Conv1D)):
        return f"it is a {kind}, and only linear layers are adapted"
    parent = type(base.get_submodule(owner))
    if name in _weights_read(parent.__mro__):
        return f"{parent.__name__} reads its weight itself, past an adapter"
    if not _gives_the_product(own):
        return f"it is a {kind}, which gives more than a product"
    return None


@functools.cache
def _weights_read(mro: tuple[type, ...]) -> frozenset[str]:
    """Return the modules whose weights the code of a class and its bases reads directly, instead of calling them.

    Kernels of state-space models take weights, and so does torch's own attention. Only the code tells: which path runs
    depends on the device.
    """
    found: set[str] = set()
    for one in mro[: mro.index(nn.Module)]:
        with contextlib.suppress(OSError, TypeError):  # made at run time
            found |= set(_READ_WHOLE.findall(inspect.getsource(one)))
    return frozenset(found)


def _gives_the_product(linear: nn.Linear | Conv1D) -> bool:
    """Return False for a linear layer whose own `forward` returns more than one tensor, as some routers do."""
    weight = linear.weight
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward) or weight.dtype not in _PLAIN:
        return True  # peft has layers of its own for quantised weights
    n_in, n_out = weight.shape if isinstance(linear, Conv1D) else reversed(weight.shape)
    try:
        given = outline(linear)(torch.empty(1, n_in, device="meta"))
    except Exception:  # whatever code of a model's own raises
        return False
    return isinstance(given, Tensor) and given.shape == (1, n_out)
