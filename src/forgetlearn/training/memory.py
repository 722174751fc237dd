"""Memory of fine-tuning: what a stage leaves is given back before the next begins."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from forgetlearn.errors import TrainingError

LARGE_BYTES = 100_000_000  # weights; below, the gaps are small too


def give_back(model: nn.Module, optimizer: Any) -> None:
    """Free a stage's gradients and the states of its optimiser, for the system to use.

    Trainer is in reference cycles: its optimiser, twice the weights, would stay until the collector comes by.
    """
    model.zero_grad(set_to_none=True)
    if hasattr(optimizer, "state"):
        optimizer.state.clear()
    if is_large(model):
        trim()


def release_device() -> None:
    """Hand back what a stage that did not fit held on the accelerator, and here."""
    gc.collect()  # Trainer is in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Hand the system what is free: glibc keeps gaps between blocks in use, for many of which there is no use.

    Other C libraries have nothing of the kind, and on Windows there is none to ask: there nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


@contextmanager
def collector_at_rest(model: nn.Module) -> Iterator[None]:
    """While a small model trains, the garbage collector passes over what is there already.

    Trainer has it look at every object of the process when it begins, which took as long as two steps of a model of
    5 million parameters. Beside a large model it is nothing, and what it finds may hold another model.
    """
    if is_large(model) or gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Trimming(TrainerCallback):  # type: ignore[misc]
    """Hands back the gaps between steps; they grow with each, since no two batches are of one size."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before a step's weights move: then only the activations are free, and the gradients stay where they are."""
        trim()


def callbacks(model: nn.Module) -> list[TrainerCallback]:
    """`Trimming` for a large model on the CPU; nothing else."""
    return [Trimming()] if is_large(model, "cpu") else []


def is_large(model: nn.Module, device: str | None = None) -> bool:
    """Whether the weights, all of them or those on one kind of device, take `LARGE_BYTES` or more."""
    weights = (weight for weight in model.parameters() if device in (None, weight.device.type))
    return sum(weight.nbytes for weight in weights) >= LARGE_BYTES


class OutOfMemory(TrainingError):
    """A stage did not fit; `touched` says whether it had begun to change weights."""

    def __init__(self, message: str, *, touched: bool) -> None:
        super().__init__(message)
        self.touched = touched


class Watch(TrainerCallback):  # type: ignore[misc]
    """Sees whether a stage has begun to change weights: until then it can begin again."""

    touched = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first of these comes before the first change."""
        self.touched = True


@contextmanager
def enough(name: str, micro_batch_size: int, watch: Watch) -> Iterator[None]:
    """Turns running out of memory, of the device's or the machine's, into an error that says what to lower.

    Raises:
        OutOfMemory: there was not enough.
    """
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
