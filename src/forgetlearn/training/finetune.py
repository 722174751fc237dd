"""One stage of supervised fine-tuning on prompt -> answer, all weights or LoRA: the only user of Trainer.

Only answer tokens are scored, EOS is one of them, and every batch of shuffled facts is one packed row.
docs/how.md has the measurements behind this.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from forgetlearn.config.schema import TrainSettings
from forgetlearn.errors import ConfigError, ModelError, TrainingError, check_installed
from forgetlearn.models import attention
from forgetlearn.models.batches import (
    IGNORE,
    MAX_PACKED_TOKENS,
    Layout,
    answer_logits,
    attention_by_text,
    by_text,
    choose_layout,
    computing,
    lay_out,
)
from forgetlearn.models.encoding import Encoded
from forgetlearn.runtime import processes, sharding, signals
from forgetlearn.training import memory, stage_checkpoints
from forgetlearn.training.callbacks import Saving, Steps, final_loss
from forgetlearn.training.stage_checkpoints import StageIO

log = logging.getLogger("forgetlearn")
BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


@dataclass(frozen=True)
class StageLog:
    """What happened in a stage: a row of numbers per optimiser step, the layout of its batches, its attention.

    `seconds` of each step stand apart: all else is the same, to the bit, where the stage is done again.
    """

    steps: tuple[dict[str, float], ...]
    layout: Layout
    attention: str | None = None
    rounding: Mapping[str, float | int | None] | None = None  # what storing the product left (rounding.Survival)
    micro_batch_size: int | None = None  # where it was made smaller, for want of memory
    seconds: tuple[float, ...] = ()

    def how(self) -> dict[str, str | int | None]:
        """How the batches were computed, for the manifest."""
        smaller = {"micro_batch_size": self.micro_batch_size} if self.micro_batch_size else {}
        return {"layout": self.layout, "attention": self.attention, **smaller}

    @property
    def final_loss(self) -> float:
        """Mean loss per answer token over the last tenth of the steps, in nats."""
        return final_loss(self.steps)


@torch.inference_mode(False)  # and with gradients, in whatever mode it is called
def finetune(
    model: nn.Module,
    texts: Sequence[Encoded],
    settings: TrainSettings,
    *,
    seed: int,
    pad_id: int,
    device: torch.device | None = None,
    variant: Variant | None = None,
    stage_io: StageIO | None = None,
) -> StageLog:
    """The log of a stage; `model` is trained in place, whichever of its parameters require gradients.

    Where `stage_io` names a folder of checkpoints that holds one of this stage, it goes on from that, to the same bits.

    The same model, texts, settings and seed give the same weights to the bit on one machine. Weights that
    are trained must be float32: half precision loses the small steps of a fact update.

    Where memory runs out before a weight has changed, it begins again with half the micro batch; the steps stay.

    Args:
        device: where to train; None leaves the choice to Trainer.

    Raises:
        TrainingError: the loss or the gradient is not finite (the message names the step), or memory ran out.
        ConfigError: bfloat16 is asked for where the device has none, or nothing is to be trained.
        RunError: the checkpoint was written by another number of processes.
        Interrupted: a signal came; where checkpoints are kept, the step was finished and saved.
    """
    asked = settings
    while True:
        try:
            stage_log = _finetune(
                model, texts, settings, seed=seed, pad_id=pad_id, device=device, variant=variant, stage_io=stage_io
            )
            break
        except memory.OutOfMemory as error:
            smaller = _smaller_micro_batch(settings)
            if error.touched or smaller is None or processes.world_size() > 1:
                raise
            told = (str(error).splitlines()[0], smaller)
        # Only here are the activations of the error's frames gone.
        log.warning("%s; beginning again with micro_batch_size = %d, the steps stay the same", *told)
        memory.release_device()
        settings = settings.model_copy(update={"micro_batch_size": smaller})
    return stage_log if settings is asked else replace(stage_log, micro_batch_size=settings.micro_batch_size)


def _smaller_micro_batch(settings: TrainSettings) -> int | None:
    """The largest divisor of the batch size up to half of the micro batch; None where that is one fact."""
    half = (settings.micro_batch_size or settings.batch_size) // 2
    return _largest_divisor(settings.batch_size, half) if half else None


def _largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is at most `most`, in O(sqrt(number)) steps: it may be 1e9."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return max(size for low in small for size in (low, number // low) if size <= most)


def _finetune(
    model: nn.Module,
    texts: Sequence[Encoded],
    settings: TrainSettings,
    *,
    seed: int,
    pad_id: int,
    device: torch.device | None,
    variant: Variant | None,
    stage_io: StageIO | None,
) -> StageLog:
    variant, stage_io = variant or Variant(), stage_io or StageIO()
    check_trainable(model, texts, settings, device)
    with _folder_for_trainer(stage_io) as folder:
        arguments = _arguments(settings, seed, folder, use_cpu=_on_cpu(device))
        arguments.report_to, arguments.run_name = list(stage_io.trackers), stage_io.name
        _check_processes(arguments)
        # Whole steps, rounded down: Trainer rounds up, and its first warm-up step has rate 0, so a stage of
        # one step would learn nothing.
        n_steps = settings.epochs * math.ceil(len(texts) / settings.batch_size)
        arguments.warmup_steps = int(settings.warmup_ratio * n_steps)
        # One process, one device: Trainer would spread a batch over all GPUs, and a packed row cannot be cut.
        arguments._n_gpu = min(1, arguments.n_gpu)
        if not sharding.is_sharded(model):
            model.to(arguments.device)
        layout = processes.gather(choose_layout(model, texts, pad_id, arguments.device))[0]
        if layout == "single":
            arguments.per_device_train_batch_size = batch = facts_at_once(settings, layout)
            arguments.gradient_accumulation_steps = settings.batch_size // batch
        steps = Steps(stage_io.name, len(texts), settings.epochs * sum(len(text.ids) for text in texts))
        own_forward = vars(model).get("forward")
        with (
            attention_by_text(model, texts, layout, pad_id, arguments.device) as is_by_text,
            computing(model, arguments.device),
            memory.collector_at_rest(model),
        ):
            sharding.ready_to_train(model)
            if memory.is_large(model):
                memory.trim()  # what loading, scoring or the subtraction left
            trainer = _FactTrainer(
                model=model,
                args=arguments,
                train_dataset=list(texts),
                data_collator=_Collator(layout, pad_id, is_by_text),
                callbacks=[steps] if variant.max_change is None else [steps, _Ball(model, variant.max_change)],
                loss_sign=variant.loss_sign,
                points=stage_io.points,
            )
            watch = memory.Watch()
            for callback in [*memory.callbacks(model), watch]:
                trainer.add_callback(callback)
            trainer.remove_callback(PrinterCallback)
            try:
                with memory.enough(stage_io.name, settings.micro_batch_size or settings.batch_size, watch):
                    trainer.train_with_points(stage_io)
            finally:
                if settings.deepspeed and trainer.deepspeed is not None:
                    trainer.deepspeed.destroy()  # its hooks on the weights, before the next stage
                # Mixed precision puts its own `forward` on the model and leaves it there.
                vars(model).pop("forward", None)
                if own_forward is not None:
                    model.forward = own_forward
                if settings.activation_checkpointing:
                    attention.plain(model).activation_checkpointing_disable()
                memory.give_back(model, trainer.optimizer)
    model.eval()
    attends = "sdpa, text by text" if is_by_text else attention.implementation(model)
    return StageLog(tuple(steps.rows), layout, attends, seconds=tuple(steps.seconds))


def check_trainable(
    model: nn.Module, texts: Sequence[Encoded], settings: TrainSettings, device: torch.device | None = None
) -> None:
    """Raise ConfigError if the stage cannot start.

    Raises:
        ConfigError: no facts, no trainable weights, weights in half precision, or bfloat16 that is not there.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    if not texts or not trained:
        raise ConfigError(f"Nothing to train: {len(texts)} facts, {len(trained)} trainable tensors.")
    if frozen := [name for name, weight in trained if weight.is_inference()]:
        raise ConfigError(
            f"{frozen[0]}: was made within torch.inference_mode(), so it cannot be trained. Load it outside."
        )
    half = [name for name, weight in trained if weight.dtype != torch.float32]
    if half:
        raise ConfigError(f"{len(half)} trainable tensors are not float32, the first is {half[0]}: call model.float().")
    check_computing(settings, device)


def check_computing(settings: TrainSettings, device: torch.device | None) -> None:
    """Raise ConfigError unless the stage's dtype, optimiser and DeepSpeed are available.

    Raises:
        ConfigError: bfloat16 on a GPU that has none; see `check_deepspeed`.
        MissingExtraError: the optimiser needs a package that is not installed.
    """
    if settings.optim in BITSANDBYTES:
        check_installed("bitsandbytes", f"optim = {settings.optim}", "8bit")
    if settings.dtype == "bfloat16" and not _on_cpu(device) and not torch.cuda.is_bf16_supported():
        raise ConfigError("dtype = bfloat16, but this GPU does not support it. Use float32.")
    check_deepspeed(settings)


def _check_processes(arguments: TrainingArguments) -> None:
    """Raise TrainingError if Trainer does not work with the running processes.

    Raises:
        TrainingError: it does not: it would train alone, in each of them, without a word.
    """
    if arguments.world_size != processes.world_size():
        raise TrainingError(
            f"{processes.world_size()} processes are there, but transformers sees {arguments.world_size}. "
            f"Start them with {processes.HOW_TO_START}"
        )


def facts_at_once(settings: TrainSettings, layout: Layout = "packed") -> int:
    """Facts of one forward pass, of all processes together: at most micro_batch_size in each, a divisor of batch_size.

    Of several processes each takes one fact at a time where they cannot be batched: all have to compute equally often.
    """
    micro = 1 if layout == "single" and processes.world_size() > 1 else settings.micro_batch_size or settings.batch_size
    most = micro * processes.world_size()
    return _largest_divisor(settings.batch_size, most)


def own_part(texts: list[Encoded]) -> list[Encoded]:
    """This process's part of a batch; where none is left, a text without answer: it is computed, and adds nothing."""
    own = texts[processes.rank() :: processes.world_size()]
    return own or [Encoded(texts[0].ids, len(texts[0].ids))]


def check_deepspeed(settings: TrainSettings) -> None:
    """Raise ConfigError if the stage needs DeepSpeed and cannot use it.

    Raises:
        ConfigError: the package or the file is not there, or the file asks for what would lose the change.
    """
    if settings.deepspeed is None:
        return
    where = f"deepspeed = {settings.deepspeed}"
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"{where}: DeepSpeed is not installed. pip install 'forgetlearn[deepspeed]'")
    try:
        asked = json.loads(Path(settings.deepspeed).read_text(encoding="utf-8"))
        stage = asked.get("zero_optimization", {}).get("stage", 0)
        half = [name for name in ("bf16", "fp16") if asked.get(name, {}).get("enabled")]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: no DeepSpeed config in JSON: {error}") from None
    if stage > 2:
        raise ConfigError(
            f"{where}: ZeRO stage {stage} splits the weights. Use --shard for that, or stage 1 or 2 here."
        )
    if half:
        raise ConfigError(f"{where}: {half[0]} makes the trained weights half precision, which loses small steps.")
    if asked.get("gradient_clipping") != "auto":
        raise ConfigError(f'{where}: needs "gradient_clipping": "auto", or max_grad_norm has no effect.')


def _on_cpu(device: torch.device | None) -> bool:
    return device.type == "cpu" if device is not None else not torch.accelerator.is_available()


def _arguments(settings: TrainSettings, seed: int, folder: str, *, use_cpu: bool) -> TrainingArguments:
    batch = facts_at_once(settings)
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=batch,  # of all processes: see `_FactTrainer.get_train_dataloader`
        gradient_accumulation_steps=settings.batch_size // batch,
        lr_scheduler_type=settings.lr_scheduler_type,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optim,
        activation_checkpointing=settings.activation_checkpointing,
        # The other kind finds no gradient to compute where only an adapter is trained.
        activation_checkpointing_kwargs={"use_reentrant": False},
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        bf16=settings.dtype == "bfloat16",
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to="none",
        deepspeed=settings.deepspeed,
    )


@contextmanager
def _folder_for_trainer(stage_io: StageIO) -> Iterator[str]:
    """Where Trainer and the trackers may write; what nobody asked for is thrown away."""
    if stage_io.trackers and stage_io.logs is not None:
        yield str(stage_io.logs)
        return
    with tempfile.TemporaryDirectory(prefix="forgetlearn-") as unused:
        yield unused


@dataclass(frozen=True)
class Variant:
    """Where a stage departs from fine-tuning: `loss_sign` -1 climbs the loss, `max_change` bounds every weight."""

    loss_sign: int = 1
    max_change: float | None = None


class _Ball(TrainerCallback):  # type: ignore[misc]
    """Puts every weight back into the L-infinity ball around where the stage began.

    It is made before a checkpoint is loaded, so that this holds after a resume too.
    """

    def __init__(self, model: nn.Module, radius: float) -> None:
        self.radius = radius
        self.start = [(weight, weight.detach().clone()) for weight in model.parameters() if weight.requires_grad]

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for weight, start in self.start:
            weight.clamp_(start - self.radius, start + self.radius)


class _Collator:
    """Encoded facts to one batch of tensors, in the layout of the stage."""

    def __init__(self, layout: Layout, pad_id: int, is_by_text: bool) -> None:
        self.layout, self.pad_id, self.is_by_text = layout, pad_id, is_by_text
        # Text by text there is no mask, so a row may be of any length.
        self.max_packed_tokens = sys.maxsize if is_by_text else MAX_PACKED_TOKENS

    def __call__(self, texts: list[Encoded]) -> dict[str, Any]:
        tokens = sum(len(text.ids) for text in texts)
        texts = own_part(texts)
        groups = [[text] for text in texts] if self.layout == "single" else [texts]
        batches = [lay_out(group, self.layout, self.pad_id, self.max_packed_tokens) for group in groups]
        if self.is_by_text:
            batches = [by_text(batch) for batch in batches]
        labels = torch.cat([batch.labels.flatten() for batch in batches])
        return {
            "parts": [{**batch.inputs, "positions": batch.positions} for batch in batches],
            "tokens": tokens,  # of all processes
            "labels": labels,
            # Trainer counts the scored tokens over an optimiser step from `shift_labels`, as they are.
            "shift_labels": labels,
        }


class _FactTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is the mean over the answer tokens of an optimiser step."""

    loss_is_scaled_for_ga = True

    def __init__(self, *, loss_sign: int, points: Path | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss_sign, self.points = loss_sign, points
        self.step_tokens, self.step_began = 0, time.perf_counter()
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the tokens and hands the number on

    def get_train_dataloader(self) -> Any:
        """Batches of all processes, in the order of one process; the collator takes this process's part.

        accelerate would fill the last batch up with facts of the first, so a step would see facts twice.
        """
        loader = super().get_train_dataloader()
        if processes.world_size() > 1:
            sampler = loader.batch_sampler
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        return loader

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sum of -log p over answer tokens, divided by their number in the whole optimiser step."""
        if return_outputs:
            raise NotImplementedError("Scores are computed by forgetlearn.evaluation.scoring, not by Trainer.")
        labels = inputs["labels"]
        self.step_tokens += inputs["tokens"]
        logits = []
        for part in inputs["parts"]:
            positions = part.pop("positions")
            logits.append(answer_logits(model, part, positions).flatten(0, 1))
        joined = torch.cat(logits) if len(logits) > 1 else logits[0]  # no copy of what may be the largest tensor
        loss = functional.cross_entropy(joined.float(), labels, ignore_index=IGNORE, reduction="sum")
        if not loss.requires_grad:
            raise ModelError(
                f"{type(attention.plain(model)).__name__}: its loss has no gradient by what is trained, because "
                "its own code stops it (as reversible layers do over frozen embeddings). Take method = f-ft."
            )
        n_tokens = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORE).sum()
        # Every process divides by the tokens of all, and DDP averages: the factor undoes the average.
        scaled: Tensor = self.loss_sign * loss / n_tokens * self.accelerator.num_processes
        return scaled

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's numbers, with the tokens that it read and the seconds since the last step's."""
        if "loss" in logs:
            now = time.perf_counter()
            logs |= {"tokens": self.step_tokens, "seconds": round(now - self.step_began, 4)}
            self.step_tokens, self.step_began = 0, now
        super().log(logs, start_time)

    def train_with_points(self, stage_io: StageIO) -> None:
        """Train, from the newest checkpoint where there is one; save more of them, and one before an interruption."""
        # A sharded optimiser cannot be loaded again into a model that was sharded as it was loaded: there a stage is
        # the unit of resume.
        sharded = ("is_distributed_loading_by_transformers", "is_fsdp_enabled", "is_deepspeed_enabled")
        if self.points is None or any(getattr(self, name, False) for name in sharded):
            self.train()
            return
        self.add_callback(Saving(stage_io.name, stage_io.minutes))
        begin = stage_checkpoints.newest(self.points, self.args.world_size)
        with signals.deferred():
            self.train(resume_from_checkpoint=str(begin) if begin else None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """In place of Trainer's, which is not atomic, and writes an adapter that acts beside others wrongly."""
        assert self.points is not None, "only Saving asks for checkpoints"
        step, place, wait = self.state.global_step, self.args.process_index, self.accelerator.wait_for_everyone
        with stage_checkpoints.writing(
            self.points, step, place=place, world_size=self.args.world_size, wait=wait
        ) as folder:
            if self.args.should_save:
                stage_checkpoints.save_weights(self.model, folder)
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stage_checkpoints.load_weights(self.model, Path(resume_from_checkpoint))
