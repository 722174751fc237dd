"""LoRA: attach, fold a coefficient in, to a dense task vector, several adapters into one: the only user of peft.

A LoRA adapter changes a weight by `scaling * B A`, with scaling = lora_alpha / r (lora_alpha / sqrt(r)
under rsLoRA). Folding `-coef` into B turns an adapter trained on the old facts into the forgetting of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetlearn.config.schema import LoraSettings
from forgetlearn.errors import ConfigError, ModelError, plain, some
from forgetlearn.runtime import processes, sharding
from forgetlearn.runtime.patterns import Pattern, problem
from forgetlearn.weights.adapter_files import ALL_LINEAR, CONFIG, WEIGHT, AdapterConfig, AdapterFiles, open_adapter
from forgetlearn.weights.checkpoint_folder import ADAPTER
from forgetlearn.weights.task_vector import TaskVector

FORGET, LEARN, PRODUCT = "forget", "learn", "default"
TRIED = "tried"  # an adapter on an outline, to see what peft makes of its targets
# What came of it, by name and by weight: several stages of a run ask for the same model.
_tried: dict[tuple[object, ...], tuple[list[str], list[str]]] = {}
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_READ_WHOLE = re.compile(r"self\.(\w+)\.weight\b(?!\[|\.(?:dtype|device|shape|size|data)\b| *=[^=])")


class NotAdaptable(ConfigError):
    """Raised if `target_modules` name something that cannot be adapted."""


def attach(model: nn.Module, settings: LoraSettings, name: str, seed: int) -> PeftModel:
    """`model` with a new adapter that trains; adapters that are there already stay active, frozen.

    The adapter begins as no change at all (B = 0). The same seed gives the same A.

    Raises:
        ConfigError: target_modules match nothing, or something that cannot be subtracted exactly.
    """
    torch.manual_seed(seed)
    frozen = list(model.peft_config) if isinstance(model, PeftModel) else []
    adapted = _new_adapter(model, settings, name)
    activate(adapted, [*frozen, name], trained=name)
    return adapted


def check_targets(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Names of the weights that the stage's adapter will change; the model is left alone: an outline of it is tried.

    Raises:
        ConfigError: as `attach`.
    """
    with torch.random.fork_rng(devices=[]):  # peft draws the first A
        # small: the rank matches nothing
        adapted = _new_adapter(outline(model), settings.model_copy(update={"r": 1}), LEARN)
        if settings.target_modules != ALL_LINEAR and (lost := _not_loaded(adapted, LEARN)):
            raise NotAdaptable(
                f"lora.target_modules = {settings.target_modules!r}: peft would not load {some(lost)} of the "
                f"finished adapter. {_what_works(model)}"
            )
    return [f"{path}.weight" for path, _layer in _layers(adapted)]


def outline(model: nn.Module) -> nn.Module:
    """A copy of the model without numbers: its modules, with weights that have names, shapes and ties only."""
    if sharding.is_sharded(model):  # it cannot be copied
        return sharding.without_weights(model)  # type: ignore[no-any-return]
    weights = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, memo={id(weight): _without_numbers(weight) for weight in weights})


def _without_numbers(weight: Tensor) -> Tensor:
    if not weight.is_floating_point():
        return weight  # quantised: of a class that peft asks for more than a shape, and nothing here changes it
    empty = torch.empty_like(weight, device="meta")
    return nn.Parameter(empty, weight.requires_grad) if isinstance(weight, nn.Parameter) else empty


def _new_adapter(model: nn.Module, settings: LoraSettings, name: str) -> PeftModel:
    _check_pattern(model, settings.target_modules)
    targets, by_weight = _targets(model, settings.target_modules)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        use_rslora=settings.use_rslora,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        adapted = _with_adapter(model, config, name, settings.target_modules, by_weight)
        _check_layers(adapted, name)
    except NotAdaptable as error:
        raise ConfigError(f"{error} {_what_works(model)}") from error
    return adapted


def _check_pattern(model: nn.Module, targets: str | list[str]) -> None:
    if isinstance(targets, str) and targets != ALL_LINEAR:
        pattern = Pattern("lora.target_modules", targets, targets)
        if said := problem([pattern], [path for path, _module in model.named_modules()]):
            raise ConfigError(f"{said}.")


def _targets(model: nn.Module, chosen: str | list[str]) -> tuple[str | list[str], list[str]]:
    """What peft is given to adapt the chosen modules: targets, and paths that it has to be given by their weights."""
    named, by_weight = _adaptable(model)
    if chosen == ALL_LINEAR:
        if not named and not by_weight:
            raise ConfigError(f"lora.target_modules = {ALL_LINEAR}: peft adapts no linear layer of this model.")
        return named, by_weight
    config = AdapterConfig(peft_type="LORA", target_modules=chosen)
    found = [path for path, _module in _plain_modules(_base_of(model)) if by_weight and config.targets(path)]
    if any(path in by_weight for path in found):
        return [path for path in found if path not in by_weight], [path for path in found if path in by_weight]
    return chosen, []


def _adaptable(model: nn.Module) -> tuple[list[str], list[str]]:
    """Paths of the linear layers that peft adapts as they are, the output head excepted: by name, and by weight.

    peft refuses some layers, and takes some names for projections of fused experts (which are no modules) wherever
    they stand, so that the list cannot be told from the classes alone: it is tried on an outline of the model.
    Layers with such names are adapted all the same where their weights are named, as `target_parameters`.
    """
    base = _base_of(model)
    head = getattr(base, "get_output_embeddings", lambda: None)()
    wanted = [
        path
        for path, module in _plain_modules(base)
        if isinstance(_own(module), (nn.Linear, Conv1D))
        and _own(module) is not head
        and not _why_not(base, path, module)
    ]
    kind = (type(base), getattr(getattr(base, "config", None), "model_type", None), *wanted)
    if kind not in _tried:
        _tried[kind] = (wanted, []) if _is_adapted_alone(model, wanted) else _adapted_by_kind(model, wanted)
    return _tried[kind]


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _adapted_by_kind(model: nn.Module, wanted: list[str]) -> tuple[list[str], list[str]]:
    """Those of these paths that peft adapts, tried together where they differ only in a number."""
    alike: dict[str, list[str]] = {}
    for path in wanted:
        alike.setdefault(re.sub(r"\b\d+\b", "*", path), []).append(path)
    named: list[str] = []
    by_weight: list[str] = []
    for paths in alike.values():
        if _is_adapted_alone(model, paths):
            named += paths
        elif _have_plain_weights(_base_of(model), paths) and _is_adapted_alone(model, [], paths):
            by_weight += paths
    return named, by_weight


def _have_plain_weights(base: nn.Module, paths: Sequence[str]) -> bool:
    """Whether all are modules whose weight peft adapts, named as a parameter, as it does the module."""
    layers: list[Any] = [_own(base.get_submodule(path)) for path in paths]
    return all(isinstance(layer, nn.Linear) and layer.weight.dtype in _PLAIN for layer in layers)


def _is_adapted_alone(model: nn.Module, named: list[str], by_weight: Sequence[str] = ()) -> bool:
    """Whether an adapter on these paths changes these modules and nothing else, and peft loads what it saves of it."""
    config = LoraConfig(r=1, target_modules=named, task_type=TaskType.CAUSAL_LM)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            adapted = _with_adapter(outline(model), config, TRIED, named, by_weight)
    except ConfigError:
        return False
    reached = {path: layer for path, layer in _layers(adapted) if TRIED in layer.lora_A}
    if reached.keys() != {*named, *by_weight} or any(isinstance(layer, ParamWrapper) for layer in reached.values()):
        return False
    return not _not_loaded(adapted, TRIED)


def _not_loaded(outlined: PeftModel, name: str) -> list[str]:
    """Return the factors that peft saves but cannot load again, since it renames some when loading."""
    saved = get_peft_model_state_dict(outlined, adapter_name=name, save_embedding_layers=False)
    return list(set_peft_model_state_dict(outlined, saved, adapter_name=name).unexpected_keys)


def _plain_modules(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a base with their paths, without those that adapters added inside them."""
    inside = None
    for path, module in base.named_modules():  # depth first
        if inside is None or not path.startswith(inside):
            inside = f"{path}." if isinstance(module, LoraLayer) else None
            yield path, module


def _own(module: nn.Module) -> nn.Module:
    """Return the module itself, without the adapter around it."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _why_not(base: nn.Module, path: str, module: nn.Module) -> str | None:
    """Return why LoRA on a module would differ merged and unmerged; None if it is exact."""
    own, (owner, _dot, name) = _own(module), path.rpartition(".")
    kind = type(own).__name__
    if isinstance(module, ParamWrapper):
        return f"{module.parameter_name} of it holds several matrices in one tensor, or those of a router ({kind})"
    if not isinstance(own, (nn.Linear, Conv1D)):
        return f"it is a {kind}, and only linear layers are adapted"
    parent = type(base.get_submodule(owner))
    if name in _weights_read(parent):  # type: ignore[arg-type]
        return f"{parent.__name__} reads its weight itself, past an adapter"
    if not _gives_the_product(own):
        return f"it is a {kind}, which gives more than a product"
    return None


@functools.cache
def _weights_read(kind: Any) -> frozenset[str]:
    """Return the names of modules whose weights the code of a class reads directly, instead of calling them.

    Kernels of state-space models take weights, and so does torch's own attention. Only the code tells: which path runs
    depends on the device.
    """
    found: set[str] = set()
    for one in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        with contextlib.suppress(OSError, TypeError):  # made at run time
            found |= set(_READ_WHOLE.findall(inspect.getsource(one)))
    return frozenset(found)


def _gives_the_product(linear: nn.Module) -> bool:
    """Return False for a linear layer whose own `forward` returns more than one tensor, as some routers do."""
    weight: Any = linear.weight
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward) or weight.dtype not in _PLAIN:
        return True  # peft has layers of its own for quantised weights
    n_in, n_out = weight.shape if isinstance(linear, Conv1D) else reversed(weight.shape)
    try:
        given = outline(linear)(torch.empty(1, n_in, device="meta"))
    except Exception:  # whatever code of a model's own raises
        return False
    return isinstance(given, Tensor) and given.shape == (1, n_out)


def _what_works(model: nn.Module) -> str:
    """A sentence for an error: the names that `target_modules` may list."""
    names = sorted({path.rsplit(".", 1)[-1] for paths in _adaptable(model) for path in paths})
    return f"It can be target_modules=[{','.join(names)}], or {ALL_LINEAR} for all of them." if names else ""


def activate(model: PeftModel, names: Sequence[str], trained: str | None = None) -> None:
    """Make these adapters act together; only `trained` learns, and only it has dropout."""
    sharding.to_parts(model)
    model.base_model.set_adapter(list(names))
    for layer_name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is not None and f".{trained}." in layer_name and "lora_" in layer_name)
    for _path, layer in _layers(model):
        for name in names:
            if name != trained and name in layer.lora_dropout:
                layer.lora_dropout[name] = nn.Identity()


@torch.no_grad()
def scale(model: PeftModel, name: str, factor: float, factors: Mapping[str, float] | None = None) -> None:
    """Multiply what an adapter adds by `factor`, in its float32 weights: -coef makes it forget.

    With `factors` (by the names of the base's weights) also by a weight's own, which is 0 where it has none.
    """
    for path, layer in _layers(model):
        if name in layer.lora_B:
            own = 1 if factors is None else factors.get(f"{path}.weight", 0)
            layer.lora_B[name].weight.mul_(factor * own)


@torch.no_grad()
def as_vector(model: PeftModel, name: str) -> TaskVector:
    """What an adapter adds, as dense float32 tensors under the names of the base model's own weights."""
    deltas = {}
    for path, layer in _layers(model):
        if name in layer.lora_B:
            deltas[f"{path}.weight"] = layer.get_delta_weight(name).float().cpu()
    return TaskVector(deltas)


@torch.no_grad()
def fold_in(model: PeftModel, name: str) -> None:
    """Add what an adapter changes to the weights under it, in place, one at a time; the adapter stays."""
    sharding.to_parts(model)
    for _path, layer in _layers(model):
        if name in layer.lora_B:
            weight: Tensor = layer.get_base_layer().weight
            sharding.local(weight).add_(sharding.like(layer.get_delta_weight(name).to(weight.dtype), weight))


@torch.no_grad()
def compose(model: PeftModel, names: Sequence[str], into: str = PRODUCT) -> None:
    """One adapter whose change is the sum of those of `names`; it alone is active afterwards.

    The A factors are stacked, the B factors set side by side with the scalings folded in, so the rank is
    the sum of the ranks, the new scaling is 1, and nothing is approximated. The old adapters are removed.
    """
    ranks = {name: int(model.peft_config[name].r) for name in names}
    targets = sorted({path for path, layer in _layers(model) for name in names if name in layer.lora_A})
    rank = sum(ranks.values())
    by_weight = sorted({path for name in names for path in _paths_by_weight(model.peft_config[name])})
    named = [path for path in targets if path not in by_weight]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=named, task_type=TaskType.CAUSAL_LM)
    _with_adapter(model, config, into, named, by_weight)
    for path, layer in _layers(model):
        if path in targets:
            _stack(layer, ranks, into)
    activate(model, [into])
    for name in names:
        model.delete_adapter(name)
    _shorten_targets(model, into, named)


def _stack(layer: LoraLayer, ranks: dict[str, int], into: str) -> None:
    """Write the factors of one layer's adapters into rows (A) and columns (B) of the new one."""
    new_a, new_b = layer.lora_A[into].weight, layer.lora_B[into].weight
    new_a.zero_()
    new_b.zero_()
    start = 0
    for name, rank in ranks.items():
        if name in layer.lora_A:
            new_a[start : start + rank] = layer.lora_A[name].weight
            new_b[:, start : start + rank] = layer.scaling[name] * layer.lora_B[name].weight
        start += rank


def _shorten_targets(model: PeftModel, name: str, targets: list[str]) -> None:
    """List the last parts of the module names in the config (q_proj, ...) where they say the same.

    Servers such as vLLM match on these; full paths remain where a short name would match more modules.
    """
    short = sorted({path.rsplit(".", 1)[-1] for path in targets})
    base = model.get_base_model()
    matched = {path for path, _module in base.named_modules() if path.rsplit(".", 1)[-1] in short}
    if matched == set(targets):
        model.peft_config[name].target_modules = set(short)


def weights_of(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Copies of an adapter's factors on the CPU, by their names in the model."""
    return {
        path: weight.detach().cpu().clone()
        for path, weight in model.named_parameters()
        if "lora_" in path and f".{name}." in path
    }


@torch.no_grad()
def set_weights(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Put back what `weights_of` gave."""
    parameters = dict(model.named_parameters())
    for path, weight in weights.items():
        parameters[path].copy_(weight)


def names(model: PeftModel) -> list[str]:
    """Adapters that the model carries, oldest first."""
    return list(model.peft_config)


def detach(model: PeftModel) -> nn.Module:
    """The base model without any adapter; its weights are those it had."""
    base: nn.Module = model.unload()
    return base


def load(model: nn.Module, folder: Path, name: str, *, device: torch.device | None = None) -> PeftModel:
    """`model` with a saved adapter, for inference.

    Raises:
        ModelError: the folder holds no safetensors adapter, see `open_adapter`, or does not fit the model: peft
            fails, a tensor that the config promises on this model is missing, or one is left over.
    """
    files = open_adapter(folder)
    files.tensors.close()
    files.check_patterns([path for path, _module in model.named_modules()])
    if kind := PEFT_TYPE_TO_CONFIG_MAPPING.get(files.config.peft_type):
        files.check_types(kind)
    try:
        with _quiet():
            config = PeftConfig.from_pretrained(str(folder))
            for field in ("rank_pattern", "alpha_pattern"):
                if getattr(config, field, {}) is None:  # null is as left out
                    setattr(config, field, {})
            by_weight = _taken_by_weight(model, config)
            adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=config)
            if by_weight:
                _adapt_by_weight(adapted, config, name, by_weight)
            # Again, since the first time peft keeps to itself which tensors did not fit.
            renamed = getattr(model, "_checkpoint_conversion_mapping", {})
            found = adapted.load_adapter(str(folder), name, is_trainable=False, key_mapping=renamed)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever peft raises, for any config that somebody wrote
        reason = plain((str(error).splitlines() or [""])[0][:200])
        if not reason or isinstance(error, LookupError):
            reason = f"{type(error).__name__} {reason}"
        raise ModelError(f"{folder}: the adapter does not fit this base model: {reason}") from error
    if not adapted.peft_config[name].is_prompt_learning:  # which is no part of the model, and checked by its shape
        weights = dict(adapted.named_parameters(remove_duplicate=False))
        loaded = {id(weight) for path, weight in weights.items() if path not in found.missing_keys}
        missing = [path for path in found.missing_keys if id(weights.get(path)) not in loaded]  # some have two names
        missing += _missing_biases(adapted, files, name)
        _check_whole(files, missing, found.unexpected_keys, name)
    if device is not None:
        adapted.to(device)
    adapted.eval()
    return adapted


def _missing_biases(model: PeftModel, files: AdapterFiles, name: str) -> list[str]:
    """Return the trained biases that the config promises and the file lacks: peft keeps the base's without a word."""
    if getattr(model.peft_config[name], "bias", "none") == "none":
        return []
    promised = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return [path for path in promised if path.endswith(".bias") and path not in files.tensors.entries]


def _taken_by_weight(model: nn.Module, config: PeftConfig) -> list[str]:
    """Linear layers that a config names by their weights; it no longer does, and they can be adapted as modules."""
    paths, modules = _paths_by_weight(config), dict(model.named_modules())
    if not all(f"{path}{WEIGHT}" in config.target_parameters and path in modules for path in paths):
        return []
    if not paths or config.rank_pattern or config.alpha_pattern or not _have_plain_weights(model, paths):
        return []
    config.target_parameters = None
    config.target_modules = config.target_modules or DUMMY_TARGET_MODULES
    return paths


def _check_whole(files: AdapterFiles, missing: Sequence[str], unexpected: Sequence[str], name: str) -> None:
    """Raise ModelError if tensors that the config promises are not in the file, or tensors of the file fit nothing."""
    if not missing and not unexpected:
        return
    n_stored = len(files.tensors.entries)
    said = []
    if missing:
        promised = n_stored - len(unexpected) + len(missing)
        named = some([key.replace(f".{name}", "") for key in missing])
        said.append(f"{len(missing)} of {promised} tensors that {CONFIG} promises on this base are missing: {named}.")
    if unexpected:
        named = some([key.replace(f".{name}", "") for key in unexpected])
        said.append(f"{len(unexpected)} of its {n_stored} tensors fit nothing: {named}.")
    remedy = "Is it the adapter of another base? Else download it again, or save it with peft's save_pretrained."
    raise ModelError(f"{files.folder / ADAPTER}: {' '.join(said)} {remedy}")


def save(model: PeftModel, name: str, folder: Path, base_model: str) -> None:
    """Write one adapter as peft does (`adapter_config.json`, safetensors), naming its base: process 0 does."""
    if not processes.is_main():
        return
    config = model.peft_config[name]
    config.base_model_name_or_path = base_model
    if isinstance(config.target_modules, set):  # peft would write it in the order of the process's hash seed
        config.target_modules = sorted(config.target_modules)
    # Its own weights, since peft would otherwise gather all of a model that is split over processes.
    own = weights_of(model, name)
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False, state_dict=own)
    nested = folder / name
    if nested.is_dir():  # peft puts every adapter but "default" one folder down
        for file in nested.iterdir():
            file.rename(folder / file.name)
        nested.rmdir()


def _with_adapter(
    model: nn.Module, config: LoraConfig, name: str, targets: object, by_weight: Sequence[str] = ()
) -> PeftModel:
    """The model with an adapter of this config; `targets` is how its target modules are called in an error.

    The linear layers `by_weight` are adapted too, as any others, and named by their weights in the config.
    """
    if by_weight and not config.target_modules:
        config.target_modules = DUMMY_TARGET_MODULES
    try:
        with _quiet():
            if isinstance(model, PeftModel):
                adapted = model
                adapted.add_adapter(name, config)
            else:
                adapted = get_peft_model(model, config, adapter_name=name)
            if by_weight:
                _adapt_by_weight(adapted, config, name, by_weight)
    except re.error as error:
        raise ConfigError(f"lora.target_modules = {targets!r} is no regular expression: {error}.") from error
    except ValueError as error:
        raise NotAdaptable(f"lora.target_modules = {targets!r}: {str(error).splitlines()[0]}") from error
    # peft writes what the last module was that it looked at, and nothing where other adapters were there before.
    bases = [layer.get_base_layer() for _path, layer in _layers(adapted) if name in layer.lora_A]
    config.fan_in_fan_out = bool(bases) and all(isinstance(base, Conv1D) for base in bases)
    return adapted


def _adapt_by_weight(model: PeftModel, config: LoraConfig, name: str, paths: Sequence[str]) -> None:
    """Put an adapter on more linear layers, and write their weights into its config.

    From a list of tensors peft takes the paths as they are. Who loads the config gets the same numbers from peft, of
    another class of layer, which makes the dense change at each step and allows no dropout.
    """
    if config.target_modules == DUMMY_TARGET_MODULES:  # with it peft adapts nothing
        config.target_modules = set()
    tensors = {f"{path}.lora_A.weight": torch.empty(0) for path in paths}
    model.base_model.inject_adapter(model.base_model.model, name, state_dict=tensors)
    model.base_model._cast_adapter_dtype(name)
    config.target_parameters = [f"{path}{WEIGHT}" for path in paths]


def _paths_by_weight(config: PeftConfig) -> list[str]:
    """The modules whose weights a config names as parameters to adapt."""
    return [name.removesuffix(WEIGHT) for name in getattr(config, "target_parameters", None) or ()]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without two of peft's warnings that are not for the user.

    It asks transformers by a name that is going out of use, and warns of tied heads, which `_check_layers`
    refuses where they matter, and of a list of tensors that is not what the config says.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|tie_word_embeddings|fan_in_fan_out).*")
        warnings.filterwarnings("ignore", message=".*inconsistency was discovered between the PEFT config.*")
        yield


def _layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Adapted layers under their names in the base model."""
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _check_layers(model: PeftModel, name: str) -> None:
    """Refuse what peft computes differently merged and unmerged: subtracting it would be silently wrong."""
    owners: dict[int, list[str]] = {}
    for path, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path.replace(".base_layer", ""))
    for path, layer in _layers(model):
        if name not in layer.lora_A and name not in layer.lora_embedding_A:
            continue
        if isinstance(layer, LoraEmbedding):
            raise ConfigError(f"lora.target_modules matches {path}: an embedding is not supported. Leave it out.")
        if reason := _why_not(model.get_base_model(), path, layer):
            raise NotAdaptable(f"lora.target_modules matches {path}: {reason}. Leave it out.")
        weight: Tensor = layer.get_base_layer().weight
        if len(owners[id(weight)]) > 1:
            raise ConfigError(
                f"lora.target_modules matches {path}, whose weight is tied to another module "
                f"({', '.join(owners[id(weight)])}). Leave it out."
            )
