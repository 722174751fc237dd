"""Answer what the names and shapes of a checkpoint leave open: the orientation of a module's matrix, and the name under
which its tensor is stored. Both come from the model that transformers builds from the config, without weights.

This needs torch and transformers, which `changes` otherwise avoids: it asks here only in doubtful cases.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from forgetlearn.errors import ModelError


def skeleton(folder: Path) -> nn.Module:
    """Build the model of a folder's config, with its weights on the meta device.

    Raises:
        ModelError: transformers makes no causal language model of that config.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # of a config that anybody may have written
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{folder}: its config makes no model: {reason}") from error
    return model


def turned(model: nn.Module, path: str) -> bool | None:
    """Return True if the module stores its matrix as (in, out), as GPT-2 does; None if there is no such module."""
    try:
        return isinstance(model.get_submodule(path), Conv1D)
    except AttributeError:
        return None


def stored_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Map the model's names of weights to those of a checkpoint, as `from_pretrained` pairs them.

    Tensors that are computed during loading (fused or split) are left out.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    weights, prefix = model.state_dict(), getattr(model, "base_model_prefix", None)
    found = {}
    for name in stored:
        own, computed = rename_source_key(name, renamings, converters, prefix, weights)
        if own not in weights and name in weights:
            own, computed = name, None
        if own in weights and computed is None:
            found[own] = name
    return found
