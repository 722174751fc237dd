"""Trainer with this project's batches, loss and checkpoints: the only subclass of transformers' Trainer."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from forgetlearn.errors import ModelError
from forgetlearn.models import attention
from forgetlearn.models.batches import IGNORE, MAX_PACKED_TOKENS, Layout, answer_logits, by_text, lay_out
from forgetlearn.models.encoding import Encoded
from forgetlearn.runtime import processes, signals
from forgetlearn.training import stage_checkpoints
from forgetlearn.training.callbacks import Saving
from forgetlearn.training.stage_checkpoints import StageIO


@dataclass(frozen=True)
class Variant:
    """Deviations from plain fine-tuning: `loss_sign` -1 climbs the loss, `max_change` bounds each weight's change."""

    loss_sign: int = 1
    max_change: float | None = None


class Ball(TrainerCallback):  # type: ignore[misc]
    """Keeps every weight in the L-infinity ball around its value at the start of the stage.

    It must be made before a checkpoint is loaded, so that the centre is still the start of the stage after a resume.
    """

    def __init__(self, model: nn.Module, radius: float) -> None:
        self.radius = radius
        self.start = [(weight, weight.detach().clone()) for weight in model.parameters() if weight.requires_grad]

    @torch.no_grad()
    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Clamp each weight into the ball."""
        for weight, start in self.start:
            weight.clamp_(start - self.radius, start + self.radius)


class StepBatch(TypedDict):
    """One forward pass of all processes. `parts` are the model's inputs for this process's facts, with `positions`."""

    parts: list[dict[str, Tensor]]
    tokens: int  # of all processes
    labels: Tensor
    shift_labels: Tensor  # from these, Trainer counts the scored tokens of an optimiser step, without a shift


@dataclass(frozen=True)
class Collator:
    """Turns encoded facts into one batch of tensors, in the layout of the stage."""

    layout: Layout
    pad_id: int
    is_by_text: bool

    def __call__(self, texts: list[Encoded]) -> StepBatch:
        """Return this process's batch: one part for each forward pass, and the labels of all parts."""
        own = own_part(texts)
        groups = [[text] for text in own] if self.layout == "single" else [own]
        # Without a mask (attention computed text by text), a row may have any length.
        longest = sys.maxsize if self.is_by_text else MAX_PACKED_TOKENS
        batches = [lay_out(group, self.layout, self.pad_id, longest) for group in groups]
        if self.is_by_text:
            batches = [by_text(batch) for batch in batches]
        labels = torch.cat([batch.labels.flatten() for batch in batches])
        return {
            "parts": [{**batch.inputs, "positions": batch.positions} for batch in batches],
            "tokens": sum(len(text.ids) for text in texts),
            "labels": labels,
            "shift_labels": labels,
        }


def own_part(texts: list[Encoded]) -> list[Encoded]:
    """Return this process's part of a batch; if it is empty, a text without an answer, which adds no loss."""
    own = texts[processes.rank() :: processes.world_size()]
    return own or [Encoded(texts[0].ids, len(texts[0].ids))]


class FactTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is the mean over the answer tokens of an optimiser step.

    It depends on private parts of Trainer, so pyproject.toml allows only tested minor versions of transformers. It
    replaces `_save_checkpoint` and `_load_from_checkpoint`, because Trainer's own checkpoints are not atomic and do
    not restore an adapter that trains beside a frozen one. `_save_optimizer_and_scheduler`, `_save_scaler` and
    `_save_rng_state` write the rest of a checkpoint. `loss_is_scaled_for_ga` and `model_accepts_loss_kwargs` make
    Trainer count the tokens of a step and leave the loss unscaled. `finetune` sets `TrainingArguments._n_gpu`.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, loss_sign: int, points: Path | None, **options: object) -> None:
        super().__init__(**options)
        self.loss_sign, self.points = loss_sign, points
        self.step_tokens, self.step_began = 0, time.perf_counter()
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[Encoded]:
        """Return the batches of all processes in the order of one process; the collator takes this process's part.

        accelerate would fill up the last batch with facts of the first, so a step would see facts twice.
        """
        loader: DataLoader[Encoded] = super().get_train_dataloader()
        if processes.world_size() > 1:
            sampler: Any = loader.batch_sampler
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        return loader

    def compute_loss(
        self,
        model: nn.Module,
        inputs: StepBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the sum of -log p over the answer tokens, divided by their number in the whole optimiser step."""
        labels = inputs["labels"]
        self.step_tokens += inputs["tokens"]
        logits = []
        for part in inputs["parts"]:
            positions = part.pop("positions")
            logits.append(answer_logits(model, part, positions).flatten(0, 1))
        joined = torch.cat(logits) if len(logits) > 1 else logits[0]  # does not copy what may be the largest tensor
        loss = functional.cross_entropy(joined.float(), labels, ignore_index=IGNORE, reduction="sum")
        if not loss.requires_grad:
            raise ModelError(
                f"{type(attention.plain(model)).__name__}: its loss has no gradient for the trained weights, because "
                "its own code stops it (as reversible layers do over frozen embeddings). Use --method f-ft."
            )
        n_tokens = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORE).sum()
        # Each process divides by the tokens of all processes, and DDP then averages; the factor undoes the average.
        scaled: Tensor = self.loss_sign * loss / n_tokens * self.accelerator.num_processes
        return scaled

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a step's numbers the tokens it read and the seconds since the last step."""
        if "loss" in logs:
            now = time.perf_counter()
            logs |= {"tokens": self.step_tokens, "seconds": round(now - self.step_began, 4)}
            self.step_tokens, self.step_began = 0, now
        super().log(logs, start_time)

    def train_with_points(self, stage_io: StageIO) -> None:
        """Train, from the newest checkpoint if there is one, and save checkpoints, one of them before a stop."""
        # The state of a sharded optimiser cannot be loaded into a model that was sharded while loading, so a sharded
        # stage is resumed from its beginning.
        sharded = ("is_distributed_loading_by_transformers", "is_fsdp_enabled", "is_deepspeed_enabled")
        if self.points is None or any(getattr(self, name, False) for name in sharded):
            self.train()
            return
        self.add_callback(Saving(stage_io.name, stage_io.minutes))
        begin = stage_checkpoints.newest(self.points)
        with signals.deferred():
            self.train(resume_from_checkpoint=str(begin) if begin else None)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        assert self.points is not None, "only Saving asks for checkpoints"
        with stage_checkpoints.writing(self.points, self.state.global_step) as folder:
            if self.args.should_save:
                stage_checkpoints.save_weights(self.model, folder)
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stage_checkpoints.load_weights(self.model, Path(resume_from_checkpoint))
