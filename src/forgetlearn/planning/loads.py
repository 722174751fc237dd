"""Compute the load of every stage from a config and facts: its texts, and one traced step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from forgetlearn.config.schema import TrainSettings, TuningSettings
from forgetlearn.config.stages import Stage, Stages
from forgetlearn.facts import FactSet
from forgetlearn.method.checks import out_of_loras_reach
from forgetlearn.models.batches import sample_of
from forgetlearn.models.null_space import MOST_TOKENS
from forgetlearn.planning.asking import Questioner, ask_loads, questioner
from forgetlearn.planning.estimate import FLOAT32, Asking, Load, Step
from forgetlearn.planning.outline import Outline
from forgetlearn.planning.texts import WORD_TOKENS, Texts, n_tokens, texts_of
from forgetlearn.planning.trace import traced
from forgetlearn.training import precision
from forgetlearn.weights.task_vector import SMALL_BYTES

# How often learning visits a text until it ends by itself. SmolLM2-135M with its facts taught in several wordings: 9 to
# 14 times in 19 of 22 runs (2 to 60 facts), 20 in the others. In one wording: 6 to 12 times in 15 of 23 runs, 4 to 5 in
# those of ten facts each, 16 with ft-c. SPREAD holds 19 of the 22 and 12 of the 23. Left out: trials of other sentences
# (13 to 165 times), locft (all its epochs) and the one run with a quiz (11).
VISITS = {True: 12, False: 8}
SPREAD = (0.7, 1.4)
FEWEST_UNTIL_GONE = 0.6  # eight capitals were gone after 13 steps of 20 planned
CHECKED = 7  # times that the texts on which the layout of training is tried are read


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the `with` block, log nothing: what the plan tries out, the update says when it does it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@_quiet()
def loads_of(outline: Outline, stages: Stages, facts: FactSet, device: str) -> tuple[list[Load], list[str]]:
    """Return the load of each stage on a kind of device, in order, and notes on what was assumed."""
    asked, problem = ask_loads(outline, stages, facts, device)
    loads, notes = train_loads(outline, stages, facts, device, asked[0].step)
    config = stages.config
    if outline.encoder is None:
        notes.insert(0, f"there is no tokenizer: {WORD_TOKENS} tokens per word are assumed; only scoring is asked")
    if config.forget.only_known and stages.method.forgets and stages.teach is None:
        notes.append("forgetting takes only facts that the model holds (forget.only_known); all are counted here")
    if stages.method.closed_form:
        notes.append("the time is that of the search for values, at most; second moments come on top")
    if config.evaluate.tasks:
        notes.append("the time leaves out evaluate.tasks")
    if config.evaluate.engine == "vllm":
        notes.append("answers are planned as those of transformers; vLLM uses all free memory of a GPU for a while")
    notes += [problem] if problem else []
    return [*loads, *asked], list(dict.fromkeys(notes))


@_quiet()
def train_loads(
    outline: Outline, stages: Stages, facts: FactSet, device: str, read: Step | None = None
) -> tuple[list[Load], list[str]]:
    """Return the load of each stage that trains, and notes on what was assumed.

    `read` is a traced step of reading; without it, what is read before the first step of a stage is left out.
    """
    loads: list[Load] = []
    notes: list[str] = []
    config, ask = stages.config, questioner(outline, stages.config, device)
    old, new = texts_of(outline.encoder, stages, facts)
    for stage, own, passes, frozen in staged(stages, old, new):
        load, problem = _train_load(outline, stage, own, passes, frozen, device, is_sharded=config.model.shard)
        unreached = out_of_loras_reach(outline.skeleton().model, config.lora) if stage.kind.adapter else None
        if stage.name == "forget" and stage.kind.subtracts_from_base:
            # The subtraction also needs the base: on the CPU, or in a file if the CPU trains a large model.
            in_memory = stages.chooses_coefficient or load.weights_bytes < SMALL_BYTES
            size = load.weights_bytes
            load = replace(load, host_bytes=size) if in_memory else replace(load, base_bytes=size)
        if ask is not None and read is not None and not stage.kind.closed_form:
            load = _with_beginning(stage, load, own, ask, read)
        loads.append(load)
        notes += [note for note in (unreached, problem) if note]
    return loads, notes


def staged(
    stages: Stages, old: Texts, new: Texts
) -> Iterator[tuple[Stage[TrainSettings], Texts, int, list[TuningSettings]]]:
    """Yield each stage that trains, with its texts, its passes over them, and the settings of earlier adapters."""
    forget = stages.forget if old.number else None
    before = [forget.settings] if forget and forget.kind.adapter else []
    trials = forget.settings.trials if forget and stages.chooses_coefficient else 1
    for stage in (stages.teach, forget):
        if stage and old.number:
            yield stage, old, stage.settings.likely_epochs, []
    if stages.method.in_context or not stages.method.learns:
        return
    passes = _passes(stages) * trials
    yield stages.learn, new, passes, [*before] if stages.learn.kind.adapter else []


def _passes(stages: Stages) -> int:
    """Return how often learning reads the facts' texts."""
    settings = stages.learn.settings
    if stages.method.closed_form:
        return settings.edit.most_steps * (settings.edit.contexts + 2)
    if not settings.ends_by_itself:
        return settings.epochs
    return min(settings.most_epochs, VISITS[settings.wordings or settings.rephrasings])


def spread_of(stage: Stage[TrainSettings]) -> tuple[float, float]:
    """Return the fewest and the most steps that a stage is likely to take, as shares of those planned."""
    settings = stage.settings
    if stage.kind.until_gone:  # answers that a model knows by heart take every pass that they may
        return FEWEST_UNTIL_GONE, settings.most_epochs / settings.likely_epochs
    varies = stage.name == "learn" and settings.ends_by_itself and not stage.kind.closed_form
    return SPREAD if varies else (1, 1)


def _train_load(
    outline: Outline,
    stage: Stage[TrainSettings],
    texts: Texts,
    passes: int,
    frozen: Sequence[TuningSettings],
    device: str,
    *,
    is_sharded: bool,
) -> tuple[Load, str | None]:
    """Return the load of a stage, and why tracing its step failed (else None)."""
    settings, kind = stage.settings, stage.kind
    skeleton = steps = outline.skeleton(outline.computes_in(kind))
    held_bytes = 0  # of the base in bfloat16, beside its own weights
    on_cpu = device == "cpu"
    holds = precision.holds_bfloat16(settings, on_cpu=on_cpu, only_adapter=kind.adapter, is_sharded=is_sharded)
    if holds and outline.computes_in(kind) == torch.float32:
        held_bytes, steps = skeleton.weights_bytes // 2, outline.skeleton(torch.bfloat16)
        steps.prepare(kind.name, settings, frozen)
        settings = settings.model_copy(update={"dtype": "float32"})  # for all that is not in bfloat16 anyway
    trained = skeleton.prepare(kind.name, settings, frozen)
    micro = settings.micro_batch_size or settings.batch_size
    step, problem = traced(lambda: steps.train_step(texts.largest_batch(micro, passes), settings, pad_id=0))
    load = Load(
        name=stage.name,
        how=kind.name,
        texts=texts.number,
        tokens=texts.computed(settings.batch_size, shares=on_cpu and not kind.closed_form),
        passes=passes,
        batch_size=settings.batch_size,
        micro_batch_size=micro,
        weights_bytes=skeleton.weights_bytes,
        trained=trained,
        kept_bytes=held_bytes + (FLOAT32 * trained if kind.bounded else 0),
        largest_layer_bytes=skeleton.largest_layer_bytes,
        step=step,
        states_bytes=skeleton.states_bytes(settings.optim),
        paged=settings.optim.startswith("paged"),
        spread=spread_of(stage),
    )
    return load, problem


def _with_beginning(stage: Stage[TrainSettings], load: Load, texts: Texts, ask: Questioner, read: Step) -> Load:
    """Return the load with what is read before the first step: to check the layout, and to turn the adapter away."""
    sample = sample_of([*texts.encoded, *texts.kept])
    asking = Asking(read_tokens=CHECKED * n_tokens(sample), rows=CHECKED + len(sample))
    settings = stage.settings
    if stage.kind.adapter and isinstance(settings, TuningSettings) and texts.kept and settings.lora.null_space:
        for own in (texts.kept, texts.encoded):
            drawn = [own[index] for index in range(min(len(own), MOST_TOKENS * len(own) // n_tokens(own)))]
            asking += ask.read(dict(enumerate(drawn)))
    return replace(load, asking=asking, read=read)
