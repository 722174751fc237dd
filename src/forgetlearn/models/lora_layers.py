"""Decide which layers of a model get a LoRA adapter, and put it on them with peft.

A layer is adapted only if peft computes it alike merged and unmerged, and can load its adapter again. peft refuses some
layers, and mistakes layers with certain names for projections of fused experts (which are not modules). Classes alone
do not show which, so an adapter is tried on an outline of the model. Layers that it mistakes are listed by weight.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
import warnings
from collections.abc import Iterator, Sequence

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetlearn.errors import ConfigError
from forgetlearn.models.language_model import LINEAR, layer_list, linear_shape
from forgetlearn.runtime.patterns import Pattern, problem
from forgetlearn.weights.adapter_files import ALL_LINEAR, WEIGHT, AdapterConfig
from forgetlearn.weights.structure import outline

FEWEST_LAYERS = 4  # in the lab's four layers, two learned 50 to 80 % of the facts, all four 90 to 95 %
TRIED = "tried"  # the adapter's name on an outline
# The layers that can be adapted, by name and by weight, cached since several stages of a run ask about one model.
_tried: dict[tuple[object, ...], tuple[list[str], list[str]]] = {}
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUERY_VALUE = "query-value"
_QUERY, _VALUE = re.compile(r"(^|_)w?q(uery)?(_|$)"), re.compile(r"(^|_)w?v(alue)?(_|$)")
_READ_WHOLE = re.compile(r"self\.(\w+)\.weight\b(?!\[|\.(?:dtype|device|shape|size|data)\b| *=[^=])")


class NotAdaptable(ConfigError):
    """Raised if `target_modules` names something that cannot be adapted."""


def targets_for(
    model: nn.Module, chosen: str | list[str], share: float | None = 1.0
) -> tuple[str | list[str], list[str]]:
    """Return the chosen modules in two parts for peft: target modules, and paths to list by their weights.

    Of all linear layers, return only those in this share of the model's layers, counted from the output; without one,
    those in the upper half, or in `FEWEST_LAYERS` if half is fewer.
    """
    if chosen == QUERY_VALUE and not (chosen := query_and_value(model)):
        raise ConfigError(
            f"lora.target_modules = {QUERY_VALUE}: this model has no modules called attention. {what_works(model)}"
        )
    if isinstance(chosen, str) and chosen != ALL_LINEAR:
        pattern = Pattern("lora.target_modules", chosen, chosen)
        if reason := problem([pattern], [path for path, _module in model.named_modules()]):
            raise ConfigError(f"{reason}.")
    named, by_weight = _adaptable(model)
    if chosen == ALL_LINEAR:
        if not named and not by_weight:
            raise ConfigError(f"lora.target_modules = {ALL_LINEAR}: peft adapts no linear layer of this model.")
        lower = _lower_layers(model, share)
        upper = [[path for path in paths if not path.startswith(lower)] for paths in (named, by_weight)]
        return (upper[0], upper[1]) if any(upper) else (named, by_weight)
    config = AdapterConfig(peft_type="LORA", target_modules=chosen)
    found = [path for path, _module in plain_modules(unwrapped(model)) if by_weight and config.targets(path)]
    if any(path in by_weight for path in found):
        return [path for path in found if path not in by_weight], [path for path in found if path in by_weight]
    return chosen, []


def query_and_value(model: nn.Module) -> list[str]:
    """Return the names of the modules that compute query and value, from the structure of the model's layers.

    If query, key and value are one matrix, it is that: the attention's module with the most outputs. The list is empty
    if no module of the layers is called attention.
    """
    found: dict[str, int] = {}
    for path, module in plain_modules(layer_list(unwrapped(model))[1]):
        if isinstance(own := own_layer(module), LINEAR) and "att" in path.lower():
            found[path.rpartition(".")[2]] = linear_shape(own)[1]
    named = [name for name in found if _QUERY.search(name.lower()) or _VALUE.search(name.lower())]
    return named or [max(found, key=lambda name: found[name])] if found else []


def _lower_layers(model: nn.Module, share: float | None) -> tuple[str, ...]:
    """Return the beginnings of the paths of modules in the layers that `targets_for` leaves out."""
    path, stack = layer_list(unwrapped(model))
    upper = max(FEWEST_LAYERS, math.ceil(len(stack) / 2)) if share is None else math.ceil(share * len(stack))
    return tuple(f"{path}.{index}." for index in range(len(stack) - upper))


def what_works(model: nn.Module) -> str:
    """Return a sentence for an error message with the names that `target_modules` may list."""
    names = sorted({path.rsplit(".", 1)[-1] for paths in _adaptable(model) for path in paths})
    return (
        f"It can be target_modules=[{','.join(names)}], {ALL_LINEAR} for all of them, or {QUERY_VALUE}."
        if names
        else ""
    )


def check_layers(model: PeftModel, name: str) -> None:
    """Raise ConfigError if peft computes a layer differently merged and unmerged: subtracting it would be wrong."""
    base = unwrapped(model)
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
    """Return the names of factors that peft saves but cannot load again, because it renames them when loading."""
    saved = get_peft_model_state_dict(outlined, adapter_name=name, save_embedding_layers=False)
    return list(set_peft_model_state_dict(outlined, saved, adapter_name=name).unexpected_keys)


def have_plain_weights(base: nn.Module, paths: Sequence[str]) -> bool:
    """Return True if peft adapts these modules in the same way, whether listed as modules or by their weights."""
    layers = [own_layer(base.get_submodule(path)) for path in paths]
    return all(isinstance(layer, nn.Linear) and layer.weight.dtype in _PLAIN for layer in layers)


def _adaptable(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the paths of the adaptable linear layers except the output head, as (by name, by weight)."""
    base = unwrapped(model)
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
    """Return the paths that peft adapts, as (by name, by weight).

    Paths that differ only in a number are tried together.
    """
    alike: dict[str, list[str]] = {}
    for path in wanted:
        alike.setdefault(re.sub(r"\b\d+\b", "*", path), []).append(path)
    named: list[str] = []
    by_weight: list[str] = []
    for paths in alike.values():
        if _is_adapted_alone(model, paths):
            named += paths
        elif have_plain_weights(unwrapped(model), paths) and _is_adapted_alone(model, [], paths):
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
    """Return the names of modules whose weights a class or its bases read directly, instead of calling the modules.

    Kernels of state-space models do so, and so does torch's own attention. Only the source code shows it, since the
    device decides which path runs.
    """
    found: set[str] = set()
    for one in mro[: mro.index(nn.Module)]:
        with contextlib.suppress(OSError, TypeError):  # the class was made at run time
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
    except Exception:  # a model's own code may raise anything
        return False
    return isinstance(given, Tensor) and given.shape == (1, n_out)


def add_adapter(
    model: nn.Module, config: LoraConfig, name: str, targets: object, by_weight: Sequence[str] = ()
) -> PeftModel:
    """Return the model with an adapter of this config; errors name its target modules as `targets`.

    The linear layers `by_weight` are adapted like any others, but the config lists them by their weights.
    """
    if by_weight and not config.target_modules:
        config.target_modules = DUMMY_TARGET_MODULES
    try:
        with quiet():
            if isinstance(model, PeftModel):
                adapted = model
                adapted.add_adapter(name, config)
            else:
                adapted = get_peft_model(model, config, adapter_name=name)
            if by_weight:
                adapt_by_weight(adapted, config, name, by_weight)
    except re.error as error:
        raise ConfigError(f"lora.target_modules = {targets!r} is not a valid regular expression: {error}.") from error
    except ValueError as error:
        raise NotAdaptable(f"lora.target_modules = {targets!r}: {str(error).splitlines()[0]}") from error
    # peft sets fan_in_fan_out by the last module that it visits, and not at all if the model has another adapter.
    bases = [layer.get_base_layer() for _path, layer in adapted_layers(adapted) if name in layer.lora_A]
    config.fan_in_fan_out = bool(bases) and all(isinstance(base, Conv1D) for base in bases)
    return adapted


def adapt_by_weight(model: PeftModel, config: PeftConfig, name: str, paths: Sequence[str]) -> None:
    """Extend an adapter to more linear layers, and list them by their weights in its config.

    If peft is given a list of tensors, it uses their paths unchanged. When it loads the config, it computes the same
    numbers in another class of layer, which builds the dense change at each step and allows no dropout.
    """
    if config.target_modules == DUMMY_TARGET_MODULES:  # with this value peft adapts nothing
        config.target_modules = set()
    tensors = {f"{path}.lora_A.weight": torch.empty(0) for path in paths}
    model.base_model.inject_adapter(model.base_model.model, name, state_dict=tensors)
    model.base_model._cast_adapter_dtype(name)
    config.target_parameters = [f"{path}{WEIGHT}" for path in paths]


def paths_by_weight(config: PeftConfig) -> list[str]:
    """Return the modules whose weights a config names as parameters to adapt."""
    return [name.removesuffix(WEIGHT) for name in getattr(config, "target_parameters", None) or ()]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the `with` block, silence peft's warnings that are not for the user.

    They are about a deprecated name of transformers, about tied heads (refused where they matter), and about a list of
    tensors that differs from the config.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|tie_word_embeddings|fan_in_fan_out).*")
        warnings.filterwarnings("ignore", message=".*inconsistency was discovered between the PEFT config.*")
        yield


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model itself, without peft's wrapper."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the adapted layers with their paths in the base model."""
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def plain_modules(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a base with their paths, without those that adapters added inside them."""
    inside = None
    for path, module in base.named_modules():  # depth first
        if inside is None or not path.startswith(inside):
            inside = f"{path}." if isinstance(module, LoraLayer) else None
            yield path, module


def own_layer(module: nn.Module) -> nn.Module:
    """Return the module itself, without the adapter around it."""
    own: nn.Module = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return own
