"""Train an adapter on the CPU in bfloat16: the frozen weights are held in bfloat16 for the stage.

Under torch's mixed precision every forward pass would cast all frozen weights, and the states between the layers would
stay float32: a step took as long as in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from forgetlearn.config.schema import TrainSettings
from forgetlearn.models import lora
from forgetlearn.models.batches import ROUNDED_TO
from forgetlearn.models.onednn import PLAIN


def holds_bfloat16(settings: TrainSettings, *, on_cpu: bool, only_adapter: bool, is_sharded: bool) -> bool:
    """Return True if a stage holds its frozen weights in bfloat16: if it trains only an adapter in bfloat16 on the CPU.

    A sharded model is left to torch's mixed precision.
    """
    return settings.dtype == "bfloat16" and on_cpu and only_adapter and not is_sharded


def trains_only_adapter(model: nn.Module) -> bool:
    """Return True if all weights that require gradients are an adapter's."""
    return all(lora.is_factor(name) for name, weight in model.named_parameters() if weight.requires_grad)


@contextmanager
def frozen_in_bfloat16(model: nn.Module) -> Iterator[None]:
    """Within the `with` block, hold the float32 weights in bfloat16, except an adapter's factors.

    Afterwards the weights have their own bits again: they are kept meanwhile, so memory grows by half their size.
    """
    own = {
        weight: weight.data
        for name, weight in model.named_parameters()
        if not lora.is_factor(name) and type(weight) in PLAIN and weight.dtype == torch.float32
    }
    try:
        for weight, data in own.items():
            weight.data = data.bfloat16()
        yield
    finally:
        for weight, data in own.items():
            weight.data = data


def row_multiple(model: nn.Module, settings: TrainSettings) -> int:
    """Return a number whose multiples the lengths of rows should be.

    For products in half precision oneDNN prepares code for each shape, which takes as long as ten products.
    """
    on_cpu = all(weight.device.type == "cpu" for weight in model.parameters())
    halves = settings.dtype == "bfloat16" or any(weight.dtype.itemsize == 2 for weight in model.parameters())
    return ROUNDED_TO if on_cpu and halves else 1
