"""Put LoRA adapters on a model's linear layers with peft, by the layers' names or by those of their weights."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers.pytorch_utils import Conv1D

from forgetlearn.errors import ConfigError
from forgetlearn.weights.adapter_files import WEIGHT


class NotAdaptable(ConfigError):
    """`target_modules` name something that cannot be adapted."""


def add_adapter(
    model: nn.Module, config: LoraConfig, name: str, targets: object, by_weight: Sequence[str] = ()
) -> PeftModel:
    """Return the model with an adapter of this config; an error names its target modules `targets`.

    The linear layers `by_weight` are adapted too, like any others, and named by their weights in the config.
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
        raise ConfigError(f"lora.target_modules = {targets!r} is no regular expression: {error}.") from error
    except ValueError as error:
        raise NotAdaptable(f"lora.target_modules = {targets!r}: {str(error).splitlines()[0]}") from error
    # peft writes the kind of the last module that it looked at, and nothing if the model has another adapter already.
    bases = [layer.get_base_layer() for _path, layer in adapted_layers(adapted) if name in layer.lora_A]
    config.fan_in_fan_out = bool(bases) and all(isinstance(base, Conv1D) for base in bases)
    return adapted


def adapt_by_weight(model: PeftModel, config: PeftConfig, name: str, paths: Sequence[str]) -> None:
    """Put an adapter on more linear layers, and write the names of their weights into its config.

    From a list of tensors peft takes the paths as they are. When the config is loaded, peft computes the same numbers
    in another class of layer, which makes the dense change at each step and allows no dropout.
    """
    if config.target_modules == DUMMY_TARGET_MODULES:  # with it peft adapts nothing
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
    """Silence warnings of peft that are not for the user.

    It uses a deprecated name of transformers, warns of tied heads, which are refused where they matter, and of a list
    of tensors that is not what the config says.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|tie_word_embeddings|fan_in_fan_out).*")
        warnings.filterwarnings("ignore", message=".*inconsistency was discovered between the PEFT config.*")
        yield


def base_of(model: nn.Module) -> nn.Module:
    """Return the model itself, without adapters' wrapper around it."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the adapted layers with their paths in the base model."""
    for path, module in base_of(model).named_modules():
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
