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
from forgetlearn.models.batches import ROUNDED_TO
from forgetlearn.models.onednn import PLAIN

ADAPTER = "lora_"


@contextmanager
def frozen_in_bfloat16(model: nn.Module, settings: TrainSettings, on_cpu: bool) -> Iterator[TrainSettings]:
    """Within the `with` block, hold the frozen float32 weights in bfloat16 if the settings ask for that dtype.

    That is so only if nothing but an adapter is trained, on the CPU; its factors stay float32. Yield the settings with
    which the stage then computes in the dtypes of the weights. Afterwards the weights have their own bits again: they
    are kept meanwhile, so memory grows by half their size.
    """
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if settings.dtype != "bfloat16" or not on_cpu or not all(ADAPTER in name for name in trained):
        yield settings
        return
    own = {
        weight: weight.data
        for name, weight in model.named_parameters()
        if ADAPTER not in name and type(weight) in PLAIN and weight.dtype == torch.float32
    }
    try:
        for weight, data in own.items():
            weight.data = data.bfloat16()
        yield settings.model_copy(update={"dtype": "float32"})
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
