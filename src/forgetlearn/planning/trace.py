"""Trace a step on tensors without values, for its peak memory, FLOPs and operations.

The model is built from its config alone under torch's FakeTensorMode, and one real step runs over it: layout,
forward, loss, backward. So nothing here depends on an architecture, and nothing large is allocated.
"""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from forgetlearn.config.methods import KindName
from forgetlearn.config.schema import TrainSettings, TuningSettings
from forgetlearn.errors import ForgetLearnError
from forgetlearn.method.kinds import STAGE_KINDS
from forgetlearn.models import lora, module_names
from forgetlearn.models.batches import ROUNDED_TO, answer_logits, lay_out, pad_left, share
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.language_model import layer_list
from forgetlearn.planning.estimate import Answering, Step
from forgetlearn.weights.structure import weightless

T = TypeVar("T")
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256  # bitsandbytes' values: smaller weights, and embeddings, have float32 states


class Skeleton:
    """A causal language model without weight values, in one dtype."""

    def __init__(self, config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> None:
        self.mode = FakeTensorMode()
        self.model = weightless(config, dtype, trust_remote_code=trust_remote_code)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights; tied weights count once."""
        return sum(weight.numel() * weight.itemsize for weight in self.model.parameters())

    @property
    def largest_layer_bytes(self) -> int:
        """Bytes of the layer with the most weights; 0 if the model has no list of layers."""
        layers = layer_list(self.model)[1]
        return max((sum(w.numel() * w.itemsize for w in layer.parameters()) for layer in layers), default=0)

    def prepare(self, how: KindName, settings: TrainSettings, frozen: Sequence[TuningSettings] = ()) -> int:
        """Make only the weights that a stage trains require gradients; return how many numbers they hold.

        `frozen` are the settings of earlier LoRA stages, whose adapters the model still carries.
        """
        modules = settings.modules if isinstance(settings, TuningSettings) else module_names.ALL
        with torch.random.fork_rng(devices=[]):
            for number, before in enumerate(frozen):
                self.model = lora.attach(self.model, before.lora, f"{lora.FORGET}{number}", 0)
            self.model = STAGE_KINDS[how].prepare(self.model, settings, lora.LEARN, 0, modules)
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)

    def states_bytes(self, optim: str) -> int:
        """Return the bytes of the optimiser's states of the trained weights: float32, or 8 bits for large weights."""
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        return sum(
            _states_bytes(weight, optim, id(weight) in embeddings)
            for weight in self.model.parameters()
            if weight.requires_grad
        )

    def train_step(self, texts: Sequence[Encoded], settings: TrainSettings, pad_id: int) -> Step:
        """Trace one micro-batch of training. If the settings accumulate gradients, run another one first, untraced."""
        accumulates = settings.micro_batch_size not in (None, settings.batch_size)
        model = self._without_numbers().train()

        def step() -> None:
            self.loss(model, texts, settings, pad_id).backward()

        with self.mode:
            if accumulates:
                step()
            return measure(model, step, sum(len(text.ids) for text in texts))

    @staticmethod
    def loss(model: nn.Module, texts: Sequence[Encoded], settings: TrainSettings, pad_id: int) -> Tensor:
        """Return the loss of one micro-batch, as `finetune` computes it."""
        batch = lay_out(texts, "packed", pad_id)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            logits = answer_logits(model, batch.inputs, batch.positions).flatten(0, 1)
            return functional.cross_entropy(logits.float(), batch.labels.flatten(), reduction="sum")

    def read_step(self, texts: Sequence[Encoded], *, shared: bool = True) -> Step:
        """Trace one batch of scoring: one row in which texts share their beginnings, or one padded row per text."""
        model = self._without_numbers().eval()
        batch = pad_left(texts, pad_id=0)  # real tensors, as in `row`, because the layout depends on their values
        row = share(texts, ROUNDED_TO)
        inputs, places = (row.inputs(), row.positions) if shared else (batch.inputs, batch.positions)
        dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
        width = inputs["input_ids"].numel()

        def step() -> None:
            given: dict[str, Tensor] = {name: self.mode.from_tensor(value) for name, value in inputs.items()}
            if shared:
                given["attention_mask"] = torch.zeros(1, 1, width, width, dtype=dtype)
            logits = answer_logits(model, given, self.mode.from_tensor(places)).flatten(0, 1).float()
            functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")
            torch.isfinite(logits).all(dim=-1)

        with self.mode, torch.inference_mode():
            return measure(model, step, width)

    def answering(self, prompts: int, prompt_tokens: int) -> Answering:
        """Trace the reading of a batch of prompts that are to be answered; return what reading and answering take."""
        model = self._without_numbers().eval()
        head = getattr(model, "get_output_embeddings", lambda: None)()
        head_flops = 2 * head.weight.numel() if head is not None else 0
        held: list[int] = []

        def step() -> None:
            ids = torch.zeros(prompts, prompt_tokens, dtype=torch.long)
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            states = [state for layer in getattr(cache, "layers", ()) for state in (layer.keys, layer.values)]
            held.append(sum(state.numel() * state.itemsize for state in states))

        with self.mode, torch.inference_mode():
            read = measure(model, step, prompts * prompt_tokens)
        body = max(0, read.flops - prompts * head_flops)
        return Answering(read, held[0] // (prompts * prompt_tokens), body, head_flops)

    def _without_numbers(self) -> nn.Module:
        """Return a copy with fake CPU tensors as weights: on the meta device, attention would take another path."""
        weights = (*self.model.parameters(), *self.model.buffers())
        with self.mode:
            fakes = {id(weight): torch.empty(weight.shape, dtype=weight.dtype) for weight in weights}
            for weight in self.model.parameters():
                fakes[id(weight)] = nn.Parameter(fakes[id(weight)], weight.requires_grad)
        return copy.deepcopy(self.model, memo=fakes)


def measure(model: nn.Module, step: Callable[[], None], tokens: int) -> Step:
    """Run one step of a model; return its peak memory besides the weights, its FLOPs, operations and bytes made."""
    log = logging.getLogger(FakeTensorMode.__module__)
    was_disabled, log.disabled = log.disabled, True  # it also logs the tracebacks of errors that are handled
    try:
        with _Live(model) as live, FlopCounterMode(display=False) as counter:
            step()
    finally:
        log.disabled = was_disabled
    return Step(tokens, live.peak, int(counter.get_total_flops()), live.operations, live.made)


def traced(trace: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the result of `trace`, or why it failed: a forward pass may read values, and fake tensors have none."""
    try:
        return trace(), None
    except ForgetLearnError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        return None, f"a step of this model cannot be traced, so activations and time are left out: {reason}"


def _states_bytes(weight: Tensor, optim: str, is_embedding: bool) -> int:
    """Return the bytes of the optimiser's states for one weight: two float32 per number, with the exceptions below."""
    if optim == "adafactor" and weight.dim() > 1:
        return 4 * (weight.numel() // weight.shape[-1] + weight.numel() // weight.shape[-2])
    if optim == "adafactor":
        return 4 * weight.numel()
    if optim.endswith("8bit") and weight.numel() >= SMALLEST_8BIT and not is_embedding:
        return 2 * (weight.numel() + 4 * math.ceil(weight.numel() / BLOCK_8BIT))  # a byte per number, a scale per block
    return 8 * weight.numel()


class _Live(TorchDispatchMode):
    """Counts operations, the bytes of all storages that they made, and of those that are still referenced.

    Gradients that exist already count too; weights and buffers do not.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.made = self.operations = 0
        self.sizes: dict[int, int] = {}
        for weight in (*model.parameters(), *model.buffers()):
            self.add(weight, counts=False)
            if weight.grad is not None:
                self.add(weight.grad)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        self.operations += 1
        for found in tree_leaves(out):
            if isinstance(found, Tensor):
                self.add(found)
        return out

    def add(self, tensor: Tensor, *, counts: bool = True) -> None:
        """Count a tensor's storage once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes() if counts else 0
            self.now += self.sizes[key]
            self.made += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)
