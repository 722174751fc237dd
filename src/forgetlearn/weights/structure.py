"""Build models without weights, to look up what a checkpoint's names and shapes do not show.

This module imports torch and transformers. Arithmetic on folders otherwise needs neither, so it uses this module only
if names and shapes are ambiguous.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from forgetlearn.errors import ModelError, WeightMismatchError
from forgetlearn.runtime import sharding
from forgetlearn.weights.adapter_files import WEIGHT


def weightless(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> nn.Module:
    """Build the model of a config with its weights on the meta device."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model


def skeleton(folder: Path) -> nn.Module:
    """Build the model of a folder's config without weights; raise ModelError if transformers cannot."""
    try:
        return weightless(AutoConfig.from_pretrained(folder))
    except Exception as error:  # anybody may have written the config
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{folder}: cannot build a model from its config: {reason}") from error


def outline(model: nn.Module) -> nn.Module:
    """Copy a model without its weights: parameters keep their names, shapes and ties, but have no data."""
    if sharding.is_sharded(model):  # deepcopy fails on a sharded model
        made: nn.Module = sharding.without_weights(model)
        return made
    weights = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, memo={id(weight): _on_meta(weight) for weight in weights})


def _on_meta(weight: Tensor) -> Tensor:
    if not weight.is_floating_point():
        return weight  # quantised: peft reads more of it than its shape, and nothing here changes it
    empty = torch.empty_like(weight, device="meta")
    return nn.Parameter(empty, weight.requires_grad) if isinstance(weight, nn.Parameter) else empty


class Structure:
    """The weightless model of a folder's config, with its weights' names in the checkpoint.

    `stored` maps the model's name of each weight to the checkpoint's, as `from_pretrained` pairs them. It omits tensors
    that are computed during loading (fused or split).
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder, self.model = folder, skeleton(folder)
        conversions = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        weights, prefix = self.model.state_dict(), getattr(self.model, "base_model_prefix", None)
        self.stored: dict[str, str] = {}
        for name in names:
            own, computed = rename_source_key(name, renamings, converters, prefix, weights)
            if own not in weights and name in weights:
                own, computed = name, None
            if own in weights and computed is None:
                self.stored[own] = name

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            return None

    def holds(self, path: str) -> bool:
        """Return True if the model has a module for the weight that the checkpoint stores at `path`."""
        own = [name for name, stored in self.stored.items() if stored == f"{path}{WEIGHT}"]
        return bool(own) and self._module(own[-1].removesuffix(WEIGHT)) is not None

    def is_transposed(self, path: str) -> bool:
        """Return True if the module at `path` stores its matrix as (in, out), as in GPT-2.

        Raises:
            WeightMismatchError: the model has no module at `path`.
        """
        if (module := self._module(path)) is None:
            raise WeightMismatchError(
                f"{self.folder}: its config makes a model without {path}, which the adapter changes. "
                "Is it the adapter of another base?"
            )
        return isinstance(module, Conv1D)
