"""Attach, scale, fold in, compose, save and load LoRA adapters on a model in memory.

A LoRA adapter changes a weight by `scaling * B A`, with scaling = lora_alpha / r (lora_alpha / sqrt(r)
under rsLoRA). Folding `-coef` into B makes an adapter trained on the old facts forget them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from forgetlearn.config.schema import LoraSettings
from forgetlearn.errors import ConfigError, ModelError, plain, some
from forgetlearn.models.language_model import layer_list
from forgetlearn.models.lora_layers import (
    NotAdaptable,
    adapt_by_weight,
    adapted_layers,
    add_adapter,
    check_layers,
    have_plain_weights,
    not_loaded,
    paths_by_weight,
    quiet,
    targets_for,
    unwrapped,
    what_works,
)
from forgetlearn.runtime import processes, sharding
from forgetlearn.weights.adapter_files import ALL_LINEAR, CONFIG, WEIGHT, AdapterConfig, AdapterFiles, open_adapter
from forgetlearn.weights.checkpoint_folder import ADAPTER
from forgetlearn.weights.structure import outline

EARLIER, FORGET, LEARN, PRODUCT = "earlier", "forget", "learn", "default"
# Of a matrix in float32, less than this share of its norm is lost in rounding.
ROUNDING = 2.0**-24


def attach(model: nn.Module, settings: LoraSettings, name: str, seed: int) -> PeftModel:
    """Return `model` with a new trainable adapter; adapters that it already has stay active but frozen.

    The new adapter starts with B = 0, so it changes nothing yet. The same seed gives the same A.

    Raises:
        ConfigError: target_modules match nothing, or something that cannot be subtracted exactly.
    """
    torch.manual_seed(seed)
    frozen = names(model) if isinstance(model, PeftModel) else []
    adapted = _new_adapter(model, settings, name)
    activate(adapted, [*frozen, name], trained=name)
    return adapted


def check_targets(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Try `attach` on an outline; return the names of the weights that it would change, or raise its errors."""
    with torch.random.fork_rng(devices=[]):  # peft draws A at random
        # The rank is small, since it makes no difference here.
        adapted = _new_adapter(outline(model), settings.model_copy(update={"r": 1}), LEARN)
        if settings.target_modules != ALL_LINEAR and (lost := not_loaded(adapted, LEARN)):
            raise NotAdaptable(
                f"lora.target_modules = {settings.target_modules!r}: peft would not load {some(lost)} of the "
                f"finished adapter. {what_works(model)}"
            )
    return [f"{path}{WEIGHT}" for path, _layer in adapted_layers(adapted)]


def _new_adapter(model: nn.Module, settings: LoraSettings, name: str) -> PeftModel:
    targets, by_weight = targets_for(model, settings.target_modules, settings.layers)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        adapted = add_adapter(model, config, name, settings.target_modules, by_weight)
        check_layers(adapted, name)
    except NotAdaptable as error:
        raise ConfigError(f"{error} {what_works(model)}") from error
    return adapted


def is_factor(path: str, name: str | None = None) -> bool:
    """Return True if a parameter is a factor of an adapter, by its name in the model; with `name`, of that adapter."""
    return "lora_" in path and (name is None or f".{name}." in path)


def trained_name(model: PeftModel) -> str:
    """Return the name of the adapter that is trained."""
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return next(
        name for name in names(model) if any(f".{name}." in path or path.endswith(f".{name}") for path in trained)
    )


def activate(model: PeftModel, names: Sequence[str], trained: str | None = None) -> None:
    """Activate these adapters together. Only `trained` gets gradients and dropout."""
    sharding.to_parts(model)
    model.base_model.set_adapter(list(names))
    for layer_name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is not None and is_factor(layer_name, trained))
    for _path, layer in adapted_layers(model):
        for name in names:
            if name != trained and name in layer.lora_dropout:
                layer.lora_dropout[name] = nn.Identity()


@contextmanager
def put_aside(model: nn.Module, name: str) -> Iterator[None]:
    """Within the `with` block, switch off the model's only adapter."""
    assert names(model) == [name], "no other adapter is switched off with it"
    try:
        with model.disable_adapter():  # type: ignore[operator]
            yield
    finally:
        activate(model, [name])  # peft would let it be trained


@torch.no_grad()
def scale(model: PeftModel, name: str, factor: float, factors: Mapping[str, float] | None = None) -> None:
    """Multiply an adapter's change by `factor`, in its float32 weights; with -coef, the adapter forgets.

    `factors` maps names of the base's weights to further factors; a weight without one gets 0.
    """
    for path, layer in adapted_layers(model):
        if name in layer.lora_B:
            own = 1 if factors is None else factors.get(f"{path}{WEIGHT}", 0)
            layer.lora_B[name].weight.mul_(factor * own)


@torch.no_grad()
def fold_in(model: PeftModel, name: str) -> None:
    """Add an adapter's change to the weights under it, in place, one at a time; the adapter remains."""
    sharding.to_parts(model)
    for _path, layer in adapted_layers(model):
        if name in layer.lora_B:
            weight: Tensor = layer.get_base_layer().weight
            sharding.local(weight).add_(sharding.like(layer.get_delta_weight(name).to(weight.dtype), weight))


@torch.no_grad()
def compose(model: PeftModel, names: Sequence[str], into: str = PRODUCT) -> None:
    """Replace adapters with one, `into`, whose change is the sum of theirs. Only that is then active.

    The A factors are stacked, and the B factors are set side by side with their scalings folded in. So the rank is the
    sum of the ranks, the new scaling is 1, and nothing is approximated. Only if an adapter of earlier updates is among
    them, and the sum exceeds what any of the matrices can have, the factors are `compacted`.
    """
    layers = {path: layer for path, layer in adapted_layers(model) if any(name in layer.lora_A for name in names)}
    ranks = {name: max(_rank(layer, name) for layer in layers.values()) for name in names}
    factors = {path: _stacked(layer, ranks) for path, layer in layers.items()}
    if EARLIER in names and sum(ranks.values()) > max(min(a.shape[1], b.shape[0]) for a, b in factors.values()):
        factors = {path: compacted(a, b) for path, (a, b) in factors.items()}
    rank = max(len(a) for a, _b in factors.values())
    by_weight = sorted({path for name in names for path in paths_by_weight(model.peft_config[name])})
    named = [path for path in sorted(layers) if path not in by_weight]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=named, task_type=TaskType.CAUSAL_LM)
    add_adapter(model, config, into, named, by_weight)
    for path, layer in layers.items():
        _fill(layer, into, *factors[path])
    activate(model, [into])
    for name in names:
        model.delete_adapter(name)


def _rank(layer: LoraLayer, name: str) -> int:
    """Return the rank of an adapter in a layer, 0 where it has none; a pattern may give each layer another."""
    return len(layer.lora_A[name].weight) if name in layer.lora_A else 0


def _stacked(layer: LoraLayer, ranks: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Return the factors A (R, D_in) and B (D_out, R) of the sum of adapters; R is the sum of `ranks`, by adapter."""
    present = next(name for name in ranks if name in layer.lora_A)
    a, b = layer.lora_A[present].weight, layer.lora_B[present].weight
    whole_a, whole_b = a.new_zeros(sum(ranks.values()), a.shape[1]), b.new_zeros(b.shape[0], sum(ranks.values()))
    start = 0
    for name, rank in ranks.items():
        if own := _rank(layer, name):
            whole_a[start : start + own] = layer.lora_A[name].weight
            whole_b[:, start : start + own] = layer.scaling[name] * layer.lora_B[name].weight
        start += rank
    return whole_a, whole_b


def compacted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (K, D_in) and (D_out, K) of the same product B A, with no more rows than it needs.

    The product is decomposed in float64, and its smallest singular values are dropped as long as together they are
    less than what float32 rounds off. The factors that remain are equally long.
    """
    directions, mixtures = torch.linalg.qr(a.detach().cpu().double().T)
    left, energies, right = torch.linalg.svd(b.detach().cpu().double() @ mixtures.T, full_matrices=False)
    lost = energies.square().flip(0).cumsum(0).flip(0)  # with this value and all smaller ones
    n_kept = max(1, int((lost > ROUNDING**2 * lost[0]).sum()))
    root = energies[:n_kept].sqrt()
    new_a, new_b = root[:, None] * (right[:n_kept] @ directions.T), left[:, :n_kept] * root
    return new_a.to(a), new_b.to(b)


def _fill(layer: LoraLayer, name: str, a: Tensor, b: Tensor) -> None:
    """Set the factors of one layer's adapter; where they have fewer rows than it has, the others are 0."""
    new_a, new_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    new_a.zero_()
    new_b.zero_()
    new_a[: len(a)] = a
    new_b[:, : len(a)] = b


def weights_of(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return copies of an adapter's factors on the CPU, by their names in the model."""
    return {path: weight.detach().cpu().clone() for path, weight in model.named_parameters() if is_factor(path, name)}


@torch.no_grad()
def set_weights(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Restore the factors that `weights_of` returned."""
    parameters = dict(model.named_parameters())
    for path, weight in weights.items():
        parameters[path].copy_(weight)


def names(model: PeftModel) -> list[str]:
    """Return the names of the model's adapters, oldest first."""
    return list(model.peft_config)


def detach(model: PeftModel) -> nn.Module:
    """Return the base model without any adapter, its weights unchanged."""
    base: nn.Module = model.unload()
    return base


def load(model: nn.Module, folder: Path, name: str, *, device: torch.device | None = None) -> PeftModel:
    """Return `model` with a saved adapter, for inference.

    Raises:
        ModelError: the folder holds no valid safetensors adapter (see `open_adapter`), or the adapter does not fit the
            model: peft fails, the file lacks a tensor that the config requires, or it has one that fits nothing.
    """
    files = open_adapter(folder)
    files.tensors.close()
    files.check_patterns([path for path, _module in model.named_modules()])
    if kind := PEFT_TYPE_TO_CONFIG_MAPPING.get(files.config.peft_type):
        files.check_types(kind)
    try:
        with quiet():
            config = PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            for field in ("rank_pattern", "alpha_pattern"):
                if getattr(config, field, {}) is None:  # null counts as absent
                    setattr(config, field, {})
            by_weight = _taken_by_weight(model, config)
            # As in PeftModel.from_pretrained, which does not report the tensors that did not fit.
            renamed = getattr(model, "_checkpoint_conversion_mapping", {})
            adapted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(model, config, name)
            if by_weight:
                adapt_by_weight(adapted, config, name, by_weight)
            found = adapted.load_adapter(str(folder), name, is_trainable=False, key_mapping=renamed)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # peft may raise anything for a config that anybody may have written
        reason = plain((str(error).splitlines() or [""])[0][:200])
        if not reason or isinstance(error, LookupError):
            reason = f"{type(error).__name__} {reason}"
        raise ModelError(f"{folder}: the adapter does not fit this base model: {reason}") from error
    if not adapted.peft_config[name].is_prompt_learning:  # a prompt is not part of the model; its shape is checked
        _check_complete(adapted, files, name, found.missing_keys, found.unexpected_keys)
    if device is not None:
        adapted.to(device)
    adapted.eval()
    return adapted


def _taken_by_weight(model: nn.Module, config: PeftConfig) -> list[str]:
    """Return the linear layers that a config names by their weights, to be adapted as modules.

    Those names are removed from the config.
    """
    paths, modules = paths_by_weight(config), dict(model.named_modules())
    if not all(f"{path}{WEIGHT}" in config.target_parameters and path in modules for path in paths):
        return []
    if not paths or config.rank_pattern or config.alpha_pattern or not have_plain_weights(model, paths):
        return []
    config.target_parameters = None
    config.target_modules = config.target_modules or DUMMY_TARGET_MODULES
    return paths


def _check_complete(
    model: PeftModel, files: AdapterFiles, name: str, missing_keys: Sequence[str], unexpected: Sequence[str]
) -> None:
    """Raise ModelError if the file lacks tensors that the config requires, or has tensors that fit nothing."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(weight) for path, weight in weights.items() if path not in missing_keys}
    missing = [path for path in missing_keys if id(weights.get(path)) not in loaded]  # some have two names
    if getattr(model.peft_config[name], "bias", "none") != "none":  # for a missing bias peft silently keeps the base's
        promised = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        missing += [path for path in promised if path.endswith(".bias") and path not in files.tensors.entries]
    n_stored = len(files.tensors.entries)
    problems = []
    if missing:
        promised_number = n_stored - len(unexpected) + len(missing)
        listed = some([key.replace(f".{name}", "") for key in missing])
        problems.append(
            f"{len(missing)} of {promised_number} tensors that {CONFIG} promises on this base are missing: {listed}."
        )
    if unexpected:
        listed = some([key.replace(f".{name}", "") for key in unexpected])
        problems.append(f"{len(unexpected)} of its {n_stored} tensors fit nothing: {listed}.")
    if problems:
        remedy = "Is it the adapter of another base? Else download it again, or save it with peft's save_pretrained."
        raise ModelError(f"{files.folder / ADAPTER}: {' '.join(problems)} {remedy}")


def save(model: PeftModel, name: str, folder: Path, base_model: str) -> None:
    """Write one adapter as peft does (`adapter_config.json`, safetensors), naming its base; only process 0 writes."""
    if not processes.is_main():
        return
    config = model.peft_config[name]
    config.base_model_name_or_path = base_model
    _name_briefly(model, config)
    if isinstance(config.target_modules, set):  # peft would write it in an order that varies by process
        config.target_modules = sorted(config.target_modules)
    # Pass the adapter's weights; otherwise peft would gather the whole of a model that is split over processes.
    own = weights_of(model, name)
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False, state_dict=own)
    nested = folder / name
    if nested.is_dir():  # peft puts every adapter but "default" in a subfolder
        for file in nested.iterdir():
            file.rename(folder / file.name)
        nested.rmdir()


def _name_briefly(model: PeftModel, config: PeftConfig) -> None:
    """Shorten `target_modules` to names of modules, plus numbers of layers if only some layers are adapted.

    Servers such as vLLM match on these names. Keep full paths if short names would match other modules too.
    """
    base = unwrapped(model)
    paths = {path for path, _module in base.named_modules()}
    if isinstance(config.target_modules, str) or not (named := set(config.target_modules or ())) <= paths:
        return
    short = sorted({path.rsplit(".", 1)[-1] for path in named})
    stack, layers = layer_list(base)
    numbers = [index for index in range(len(layers)) if any(path.startswith(f"{stack}.{index}.") for path in named)]
    in_layers: dict[str, object] = {"layers_to_transform": numbers, "layers_pattern": stack.rsplit(".", 1)[-1]}
    for chosen in ({}, in_layers):
        brief = AdapterConfig.model_validate({"peft_type": "LORA", "target_modules": short, **chosen})
        if {path for path in paths if brief.targets(path)} == named:
            config.target_modules = set(short)
            for name, value in chosen.items():
                setattr(config, name, value)
            return
