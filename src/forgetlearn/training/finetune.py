"""Fine-tune all weights or a LoRA adapter on prompt -> answer, for one stage.

The loss counts only answer tokens, including EOS. Facts are shuffled, and each batch is one packed row. docs/how.md
has the measurements behind this.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from forgetlearn.config.schema import TrainSettings
from forgetlearn.errors import ConfigError, TrainingError, check_installed
from forgetlearn.models import attention
from forgetlearn.models.batches import Layout, choose_layout, computing, rows_for_training
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.language_model import width
from forgetlearn.models.lora_products import fused_adapters
from forgetlearn.runtime import processes, sharding
from forgetlearn.training import memory, precision
from forgetlearn.training.callbacks import Steps, final_loss
from forgetlearn.training.schedule import Schedule, Wordings
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.training.trainer import Ball, Collator, EndStep, FactTrainer, Variant

log = logging.getLogger("forgetlearn")
BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


@dataclass(frozen=True)
class StageLog:
    """The log of a finished stage: a row of numbers per optimiser step, the layout of its batches, its attention.

    The `seconds` of the steps are kept apart, because everything else is the same, to the bit, if the stage is
    repeated.
    """

    steps: tuple[dict[str, float], ...]
    layout: Layout | None = None  # None for a stage that does not fine-tune
    attention: str | None = None
    rounding: Mapping[str, float | int | None] | None = None  # what survived storing (rounding.Survival)
    micro_batch_size: int | None = None  # set if it was lowered for lack of memory
    epochs: int | None = None
    unlearned: tuple[int, ...] = ()  # facts, by index, not learned (or not gone) in the most epochs
    second_moments: str | None = None  # the text that an edit computed them on, in words
    seconds: tuple[float, ...] = ()

    def batching(self) -> dict[str, str | int | None]:
        """Return how the batches were computed, for the manifest."""
        smaller = {"micro_batch_size": self.micro_batch_size} if self.micro_batch_size else {}
        return {"layout": self.layout, "attention": self.attention, **smaller}

    @property
    def final_loss(self) -> float | None:
        """Mean loss per answer token over the last tenth of the steps, in nats; None for a stage without steps."""
        return final_loss(self.steps) if self.steps else None


@torch.inference_mode(False)  # gradients are needed even if the caller is in inference mode
def finetune(
    model: nn.Module,
    facts: Sequence[Encoded | Wordings],
    settings: TrainSettings,
    *,
    seed: int,
    pad_id: int,
    device: torch.device | None = None,
    variant: Variant | None = None,
    stage_io: StageIO | None = None,
) -> StageLog:
    """Train the parameters of `model` that require gradients, in place, and return the log of the stage.

    With `until` learned, the stage ends when the model has predicted each fact's whole answer (see `Schedule`); with
    `until` forgotten, when each answer is gone (see `objectives`).

    If `stage_io` names a folder with a checkpoint of this stage, training continues from it and ends with the same
    bits. On one machine, the same model, texts, settings and seed give the same weights to the bit. The trained weights
    must be float32: half precision loses the small steps of a fact update. If memory runs out before any weight has
    changed, the stage starts again with half the micro-batch; the optimiser steps stay the same.

    Args:
        facts: the text of each fact, or a tuple of wordings, of which each visit shows one.
        device: where to train; None leaves the choice to Trainer.

    Raises:
        TrainingError: the loss or the gradient is not finite (the message names the step), or memory ran out.
        ConfigError: the device does not support bfloat16, or nothing can be trained, see `check_trainable`.
        RunError: the checkpoint was written by a different number of processes.
        Interrupted: a signal was received; if checkpoints are kept, the step was finished and saved.
    """
    wordings = [fact if isinstance(fact, tuple) else (fact,) for fact in facts]
    check_trainable(model, wordings, settings, device)
    variant, stage_io = variant or Variant(), stage_io or StageIO()
    asked = settings
    while True:
        try:
            stage_log = _train(model, wordings, settings, seed, pad_id, device, variant, stage_io)
            return stage_log if settings is asked else replace(stage_log, micro_batch_size=settings.micro_batch_size)
        except memory.OutOfMemory as error:
            half = (settings.micro_batch_size or settings.batch_size) // 2
            if error.touched or not half or processes.world_size() > 1:
                raise
            reason = str(error).splitlines()[0]
        # The error's frames hold activations, which are freed only here.
        smaller = _largest_divisor(settings.batch_size, half)
        log.warning(
            "%s; starting the stage again with micro_batch_size = %d; the optimiser steps stay the same",
            reason,
            smaller,
        )
        memory.release_device()
        settings = settings.model_copy(update={"micro_batch_size": smaller})


def _train(
    model: nn.Module,
    facts: Sequence[Wordings],
    settings: TrainSettings,
    seed: int,
    pad_id: int,
    device: torch.device | None,
    variant: Variant,
    stage_io: StageIO,
) -> StageLog:
    with _folder_for_trainer(stage_io) as folder:
        settings = settings.model_copy(update={"learning_rate": settings.rate(width(model))})
        in_bfloat16 = precision.holds_bfloat16(
            settings,
            on_cpu=_on_cpu(device),
            only_adapter=precision.trains_only_adapter(model),
            is_sharded=sharding.is_sharded(model),
        )
        if in_bfloat16:  # the weights' own dtype decides
            settings = settings.model_copy(update={"dtype": "float32"})
        arguments = _arguments(settings, seed, folder, n_facts=len(facts), use_cpu=_on_cpu(device))
        arguments.report_to, arguments.run_name = list(stage_io.trackers), stage_io.name
        # Trainer would spread a batch over all GPUs of the process, but a packed row cannot be split.
        arguments._n_gpu = min(1, arguments.n_gpu)
        if not sharding.is_sharded(model):
            model.to(arguments.device)
        kept = variant.kept.texts if variant.kept else ()
        texts = [*(text for wordings in facts for text in wordings), *kept]
        layout = processes.gather(choose_layout(model, texts, pad_id, arguments.device))[0]
        if layout == "single":
            arguments.per_device_train_batch_size = batch = facts_at_once(settings, layout)
            arguments.gradient_accumulation_steps = settings.batch_size // batch
        schedule = Schedule(facts, settings, seed, arguments.gradient_accumulation_steps, variant.kept)
        arguments.max_steps = min(schedule.max_steps, variant.most_steps or schedule.max_steps)
        steps = Steps(stage_io.name)
        with (
            rows_for_training(model, texts, layout, pad_id, arguments.device) as (layout, is_by_text),
            computing(model, arguments.device),
            fused_adapters(),
            precision.frozen_in_bfloat16(model) if in_bfloat16 else nullcontext(),  # the layout was checked before
            memory.collector_at_rest(model),
        ):
            sharding.ready_to_train(model)
            if memory.is_large(model):
                memory.trim()  # memory left over from loading, scoring or subtracting
            watch = memory.Watch(model)
            ball = [] if variant.max_change is None else [Ball(model, variant.max_change)]
            trainer = FactTrainer(
                model=model,
                args=arguments,
                data_collator=Collator(layout, pad_id, is_by_text, kept, precision.row_multiple(model, settings)),
                callbacks=[steps, watch, *ball, EndStep(schedule)],
                schedule=schedule,
                objective=variant.objective,
                points=stage_io.points,
            )
            trainer.remove_callback(PrinterCallback)
            micro_batch_size = settings.micro_batch_size or settings.batch_size
            with _put_back(model, trainer, settings), memory.enough(stage_io.name, micro_batch_size, watch):
                trainer.train_with_points(stage_io)
    model.eval()
    learned = schedule.learned if settings.ends_by_itself else []
    return StageLog(
        steps=tuple(steps.rows),
        layout=layout,
        attention="sdpa, text by text" if is_by_text else attention.implementation(model),
        epochs=schedule.progress.epoch,
        unlearned=tuple(index for index, is_learned in enumerate(learned) if not is_learned),
        seconds=tuple(steps.seconds),
    )


@contextmanager
def _put_back(model: nn.Module, trainer: FactTrainer, settings: TrainSettings) -> Iterator[None]:
    """Undo on exit what Trainer changed on the model, and free its memory."""
    own_forward = vars(model).get("forward")
    try:
        yield
    finally:
        if settings.deepspeed and trainer.deepspeed is not None:
            trainer.deepspeed.destroy()  # removes its hooks from the weights before the next stage
        # Mixed precision puts its own `forward` on the model and leaves it there.
        vars(model).pop("forward", None)
        if own_forward is not None:
            model.forward = own_forward
        if settings.activation_checkpointing:
            attention.plain(model).activation_checkpointing_disable()
        memory.give_back(model, trainer.optimizer)


def check_trainable(
    model: nn.Module, texts: Sequence[object], settings: TrainSettings, device: torch.device | None = None
) -> None:
    """Raise ConfigError if the stage cannot start: no facts, no trainable weights, or weights that are not float32."""
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
    """Raise ConfigError unless the stage's dtype, optimiser and DeepSpeed are available."""
    if settings.optim in BITSANDBYTES:
        check_installed("bitsandbytes", f"optim = {settings.optim}", "8bit")
    if settings.dtype == "bfloat16" and not _on_cpu(device) and not torch.cuda.is_bf16_supported():
        raise ConfigError("dtype = bfloat16, but this GPU does not support it. Use float32.")
    if settings.deepspeed is not None:
        check_deepspeed(settings.deepspeed)


def check_deepspeed(file: str) -> None:
    """Raise ConfigError unless DeepSpeed is installed and its config keeps trained weights whole and in float32."""
    where = f"deepspeed = {file}"
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"{where}: DeepSpeed is not installed. pip install 'forgetlearn[deepspeed]'")
    try:
        asked = json.loads(Path(file).read_text(encoding="utf-8"))
        stage = asked.get("zero_optimization", {}).get("stage", 0)
        half = [name for name in ("bf16", "fp16") if asked.get(name, {}).get("enabled")]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: is not a DeepSpeed config in JSON: {error}") from None
    if stage > 2:
        raise ConfigError(
            f"{where}: ZeRO stage {stage} splits the weights. Use --shard for that, or stage 1 or 2 here."
        )
    if half:
        raise ConfigError(
            f"{where}: {half[0]} makes the trained weights half precision, which would lose small updates."
        )
    if asked.get("gradient_clipping") != "auto":
        raise ConfigError(f'{where}: needs "gradient_clipping": "auto", or max_grad_norm has no effect.')


def facts_at_once(settings: TrainSettings, layout: Layout = "packed") -> int:
    """Return the number of facts in one forward pass of all processes, a divisor of batch_size.

    Each process takes at most micro_batch_size. If facts cannot be batched, each of several processes takes one at a
    time, because all must run equally many forward passes.
    """
    micro = 1 if layout == "single" and processes.world_size() > 1 else settings.micro_batch_size or settings.batch_size
    return _largest_divisor(settings.batch_size, micro * processes.world_size())


def _largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` up to `most`, in O(sqrt(number)) steps, as `number` may be 1e9."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return max(size for low in small for size in (low, number // low) if size <= most)


def _on_cpu(device: torch.device | None) -> bool:
    return device.type == "cpu" if device is not None else not torch.accelerator.is_available()


def _arguments(settings: TrainSettings, seed: int, folder: str, *, n_facts: int, use_cpu: bool) -> TrainingArguments:
    """Return the arguments for Trainer; raise TrainingError if Trainer does not see all processes."""
    batch = facts_at_once(settings)
    arguments = TrainingArguments(
        output_dir=folder,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=batch,  # of all processes: see `Collator`
        gradient_accumulation_steps=settings.batch_size // batch,
        lr_scheduler_type=settings.lr_scheduler_type,
        # Rounded down to whole steps. Trainer rounds up, and its first warm-up step has learning rate 0, so a stage of
        # one step would learn nothing.
        warmup_steps=int(settings.warmup_ratio * settings.likely_epochs * math.ceil(n_facts / settings.batch_size)),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optim,
        activation_checkpointing=settings.activation_checkpointing,
        # Reentrant checkpointing finds no gradient to compute if only an adapter is trained.
        activation_checkpointing_kwargs={"use_reentrant": False},
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        bf16=settings.dtype == "bfloat16",
        seed=seed,
        data_seed=seed,
        ignore_data_skip=True,  # the schedule itself goes on where a checkpoint was written
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
    if arguments.world_size != processes.world_size():
        raise TrainingError(
            f"{processes.world_size()} processes are running, but transformers sees {arguments.world_size}. "
            f"Start them with {processes.HOW_TO_START}"
        )
    return arguments


@contextmanager
def _folder_for_trainer(stage_io: StageIO) -> Iterator[str]:
    """Yield a folder that Trainer and the trackers may write to. Without trackers, it is removed afterwards."""
    if stage_io.trackers and stage_io.logs is not None:
        yield str(stage_io.logs)
        return
    with tempfile.TemporaryDirectory(prefix="forgetlearn-") as unused:
        yield unused
