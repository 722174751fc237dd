"""Trainer with this project's batches, loss and checkpoints: the only subclass of transformers' Trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from forgetlearn.errors import ModelError
from forgetlearn.models import attention
from forgetlearn.models.batches import (
    IGNORE,
    MAX_PACKED_TOKENS,
    Layout,
    answer_logits,
    lay_out,
    row_by_text,
    row_inputs,
)
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.top_logprobs import divergence
from forgetlearn.runtime import processes, signals
from forgetlearn.storage import disk
from forgetlearn.training import stage_checkpoints
from forgetlearn.training.callbacks import Saving
from forgetlearn.training.objectives import LEARN, Objective, OfStep
from forgetlearn.training.schedule import Kept, MicroBatch, Progress, Schedule
from forgetlearn.training.stage_checkpoints import StageIO

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Variant:
    """Deviations from plain fine-tuning.

    `objective` is what the stage minimises, `max_change` bounds each weight's change, `kept` is what the model is to
    say as before, and `most_steps` ends the stage.
    """

    objective: Objective = LEARN
    max_change: float | None = None
    kept: Kept | None = None
    most_steps: int | None = None


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


class EndStep(TrainerCallback):  # type: ignore[misc]
    """Tells the schedule that a step is done, and ends the stage when the schedule does."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """End the stage at once if it is resumed after its last step."""
        control.should_training_stop = self.schedule.finished

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Move the schedule on."""
        self.schedule.end_step()
        if self.schedule.finished:
            control.should_training_stop = True


class StepBatch(TypedDict):
    """One forward pass of all processes. `parts` are the model's inputs for this process's texts, see `Collator`.

    The answer tokens of facts come first, then those of kept texts.
    """

    parts: list[dict[str, Tensor]]
    tokens: int  # of all processes
    facts: list[tuple[int, Encoded]]  # of this process: index of a fact, and its text
    n_facts: int  # of all processes, in the whole optimiser step
    labels: Tensor
    shift_labels: Tensor  # from these, Trainer counts the scored tokens of an optimiser step, without a shift
    kept: list[int]  # of this process
    n_kept_tokens: int  # of all processes, in the whole optimiser step


@dataclass(frozen=True)
class Collator:
    """Turns the texts of a micro-batch into one batch of tensors, in the layout of the stage.

    A row of shared beginnings is filled up to a multiple of `multiple` tokens.
    """

    layout: Layout
    pad_id: int
    is_by_text: bool
    kept: Sequence[Encoded] = ()
    multiple: int = 1

    def __call__(self, micro: MicroBatch) -> StepBatch:
        """Return this process's batch: one part for each forward pass, and the labels of all parts."""
        rank, world = processes.rank(), processes.world_size()
        own = own_part(micro.texts)
        kept = micro.kept[rank::world]
        texts = [*own, *(self.kept[index] for index in kept)]
        groups = [[text] for text in texts] if self.layout == "single" else [texts]
        labels = torch.tensor([token for text in own for token in text.answer_ids], dtype=torch.long)
        return {
            "parts": [self._part(group) for group in groups],
            "tokens": sum(len(text.ids) for text in (*micro.texts, *(self.kept[index] for index in micro.kept))),
            "facts": list(zip(micro.facts[rank::world], own, strict=False)),
            "n_facts": micro.n_facts,
            "labels": labels,
            "shift_labels": labels,
            "kept": list(kept),
            "n_kept_tokens": micro.n_kept_tokens,
        }

    def _part(self, texts: list[Encoded]) -> dict[str, Tensor]:
        """Return the inputs of one forward pass, with the `positions` of logits.

        `places` are the answers' places among these logits; they are left out if the logits are just those.
        """
        if self.is_by_text:
            row = row_by_text(texts, self.layout, self.multiple)
            return {**row_inputs(row), "positions": row.positions} | _places(row.which, len(row.positions))
        batch = lay_out(texts, self.layout, self.pad_id, MAX_PACKED_TOKENS)
        places = (batch.labels.flatten() != IGNORE).nonzero()[:, 0]
        return {**batch.inputs, "positions": batch.positions} | _places(places, batch.labels.numel())


def _places(places: Tensor, n_logits: int) -> dict[str, Tensor]:
    return {} if places.equal(torch.arange(n_logits)) else {"places": places}


def own_part(texts: Sequence[Encoded]) -> list[Encoded]:
    """Return this process's part of a batch; if it is empty, a text without an answer, which adds no loss."""
    own = list(texts[processes.rank() :: processes.world_size()])
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

    def __init__(self, *, schedule: Schedule, objective: Objective, points: Path | None, **options: object) -> None:
        super().__init__(**options, train_dataset=schedule)
        self.schedule, self.objective, self.points = schedule, objective, points
        self.step_tokens, self.step_began = 0, time.perf_counter()
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[MicroBatch]:
        """Return the micro-batches of all processes; the collator takes this process's part.

        accelerate would fetch a batch ahead, before the step that decides what it holds, and would divide it.
        """
        # Its own generator, because otherwise each start, and so each resume, would draw from the global one.
        own = torch.Generator()
        return DataLoader(self.schedule, batch_size=None, collate_fn=self.data_collator, generator=own)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: StepBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this batch's share of the objective, a mean over the facts' answers in the whole optimiser step.

        Kept texts add the mean divergence over their answer tokens, times its weight.
        """
        labels = inputs["labels"]
        self.step_tokens += inputs["tokens"]
        logits = [self._answer_logits(model, part) for part in inputs["parts"]]
        joined = torch.cat(logits) if len(logits) > 1 else logits[0]  # does not copy what may be the largest tensor
        of_facts = joined[: len(labels)]
        texts = [text for _index, text in inputs["facts"]]
        n_tokens = num_items_in_batch if num_items_in_batch is not None else len(labels)
        loss = self.objective.loss(of_facts, labels, OfStep(texts, n_tokens, inputs["n_facts"]))
        if not loss.requires_grad:
            raise ModelError(
                f"{type(attention.plain(model)).__name__}: its loss has no gradient for the trained weights, because "
                "its own code stops it (as reversible layers do over frozen embeddings). Use --method f-ft."
            )
        if self.schedule.settings.ends_by_itself:
            reached = self.objective.reached(of_facts, labels, texts)
            self.schedule.note({index: each for (index, _text), each in zip(inputs["facts"], reached, strict=True)})
        if inputs["n_kept_tokens"]:
            kept = self.schedule.kept
            of_kept = divergence(kept.base(inputs["kept"]), joined[len(labels) :]).sum()
            loss = loss + kept.weight * of_kept / inputs["n_kept_tokens"]
        # Each process divides by the tokens of all processes, and DDP then averages; the factor undoes the average.
        shared: Tensor = loss * self.accelerator.num_processes
        return shared

    @staticmethod
    def _answer_logits(model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        """Return the logits (N, V) that predict the answer tokens of a forward pass, text after text."""
        positions, places = part.pop("positions"), part.pop("places", None)
        logits = answer_logits(model, part, positions).flatten(0, 1)
        return logits if places is None else logits.index_select(0, places)

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
            self.schedule.gather()
            if self.args.should_save:
                disk.write_json(folder / PROGRESS, self.schedule.progress.model_dump())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stage_checkpoints.load_weights(self.model, Path(resume_from_checkpoint))
        self.schedule.progress = Progress.model_validate(disk.read_json(Path(resume_from_checkpoint) / PROGRESS))
