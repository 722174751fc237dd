"""Memory of fine-tuning: a stage gives back what it used, and begins again smaller if it did not fit."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState

from forgetlearn.errors import TrainingError

LARGE_BYTES = 100_000_000  # weights; below, the gaps are small too


class OutOfMemory(TrainingError):
    """A stage did not fit; `touched` says whether it had begun to change weights."""

    def __init__(self, message: str, *, touched: bool) -> None:
        super().__init__(message)
        self.touched = touched


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes that a stage begins to change weights; with a large model on the CPU, trims memory between steps.

    The gaps between blocks grow with each step, since no two batches are of one size. Before the weights move only
    the activations are free, and the gradients stay where they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.touched, self.trims = False, is_large(model, "cpu")

    def on_pre_optimizer_step(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Is called before the weights change, and for the first time before their first change."""
        self.touched = True
        if self.trims:
            trim()


@contextmanager
def enough(name: str, micro_batch_size: int, watch: Watch) -> Iterator[None]:
    """Raise OutOfMemory, which says what to lower, if the device or the machine runs out of memory."""
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
    """Free a stage's gradients and the states of its optimiser.

    Trainer is in reference cycles: its optimiser, twice the weights, would stay until the garbage collector runs.
    """
    model.zero_grad(set_to_none=True)
    if hasattr(optimizer, "state"):
        optimizer.state.clear()
    if is_large(model):
        trim()


def release_device() -> None:
    """Free what a stage that did not fit held on the accelerator and in main memory."""
    gc.collect()  # Trainer is in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Return free memory to the system: glibc keeps the gaps between blocks in use. Other C libraries do not."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if release is not None:
        release(0)


@contextmanager
def collector_at_rest(model: nn.Module) -> Iterator[None]:
    """Let the garbage collector ignore all existing objects while a small model trains.

    Trainer runs it over every object of the process at its start, which took as long as two steps of a model of
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


def is_large(model: nn.Module, device: str | None = None) -> bool:
    """Return True if the weights, all of them or those on one kind of device, take `LARGE_BYTES` or more."""
    weights = (weight for weight in model.parameters() if device in (None, weight.device.type))
    return sum(weight.nbytes for weight in weights) >= LARGE_BYTES
