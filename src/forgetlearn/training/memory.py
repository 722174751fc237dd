"""Manage the memory of fine-tuning: notice that a stage does not fit, and free what it used."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState

from forgetlearn.errors import TrainingError

LARGE_BYTES = 100_000_000  # of weights; in smaller models, the gaps in memory are small too
GROWTH = 1.1  # of the process, after which its memory is trimmed


class OutOfMemory(TrainingError):
    """A stage ran out of memory; `touched` is True if it had begun to change weights."""

    def __init__(self, message: str, *, touched: bool) -> None:
        super().__init__(message)
        self.touched = touched


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes when a stage begins to change weights. Trims memory between the steps of a large model on the CPU.

    The gaps between memory blocks grow with each step, since batches differ in size. Just before an optimiser
    step, the activations are already free, but the gradients are still needed. The first step is trimmed, since the
    optimiser then makes its states; later ones only if the process has grown since the second. To trim each step would
    take a tenth of it, as the next one has to get its memory from the system again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.touched, self.trims = False, is_large(model, "cpu")
        self.sizes: list[int] = []  # bytes of the process before the first and the second step

    def on_pre_optimizer_step(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Note that weights are about to change; trim memory for a large model on the CPU."""
        self.touched = True
        if self.trims and self._has_grown():
            trim()

    def _has_grown(self) -> bool:
        """Return True in the first step, and later if the process has grown since the second."""
        size = psutil.Process().memory_info().rss
        if len(self.sizes) < 2:
            self.sizes.append(size)
        return len(self.sizes) == 1 or size > GROWTH * self.sizes[1]


@contextmanager
def enough(name: str, micro_batch_size: int, watch: Watch) -> Iterator[None]:
    """Raise OutOfMemory, with advice on what to lower, if the device or the machine runs out of memory in the body."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        lower = f"Lower micro_batch_size ({micro_batch_size} now): the steps stay the same. Or set "
        raise OutOfMemory(
            f"{name}: out of memory: {str(error).splitlines()[0]}\n"
            f"{lower if micro_batch_size > 1 else 'Set '}activation_checkpointing = true, or use LoRA (f-lora).",
            touched=watch.touched,
        ) from error


def give_back(model: nn.Module, optimizer: Optimizer) -> None:
    """Free the gradients of a stage and the states of its optimiser.

    Trainer is part of reference cycles, so its optimiser's states (twice the size of the weights) would stay until
    the garbage collector runs.
    """
    model.zero_grad(set_to_none=True)
    if hasattr(optimizer, "state"):
        optimizer.state.clear()
    if is_large(model):
        trim()


def release_device() -> None:
    """Free what a stage that ran out of memory held on the accelerator and in main memory."""
    gc.collect()  # Trainer is part of reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Return free memory to the system. glibc keeps the gaps between blocks in use; other C libraries do not."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if release is not None:
        release(0)


@contextmanager
def collector_at_rest(model: nn.Module) -> Iterator[None]:
    """Make the garbage collector ignore all existing objects while a small model trains.

    At its start, Trainer runs the collector over every object of the process, which took as long as two steps of a
    model of 5 million parameters. For a large model this time does not matter, and the collector may free another
    model.
    """
    if is_large(model) or gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def is_large(model: nn.Module, device: str | None = None) -> bool:
    """Return True if the weights (on one kind of device, if given) take `LARGE_BYTES` or more."""
    weights = (weight for weight in model.parameters() if device in (None, weight.device.type))
    return sum(weight.nbytes for weight in weights) >= LARGE_BYTES
