"""Compute the load of every stage from a config and facts: its texts, and one traced step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from forgetlearn.config.schema import TrainSettings, TuningSettings
from forgetlearn.config.stages import Stage, Stages
from forgetlearn.errors import ForgetLearnError
from forgetlearn.evaluation.damage import ROOM
from forgetlearn.evaluation.general_prompts import measuring
from forgetlearn.evaluation.scoring import MARGIN_TOKENS, pairs_to_read
from forgetlearn.facts import Fact, FactSet
from forgetlearn.method import lessons
from forgetlearn.method.checks import out_of_loras_reach
from forgetlearn.method.targets import requests
from forgetlearn.models.batches import GPU_ROW_TOKENS, ROW_TOKENS, shared_rows
from forgetlearn.models.encoding import Encoded, Encoder
from forgetlearn.planning.estimate import FLOAT32, Load
from forgetlearn.planning.outline import Outline
from forgetlearn.weights.task_vector import SMALL_BYTES

T = TypeVar("T")
QUIZ_EPOCHS = 1.6  # times as many until its questions are learned too (bench/results/probes.md)
WORD_TOKENS = 1.5  # tokens per word if there is no tokenizer


@dataclass(frozen=True)
class Texts:
    """The encoded texts of a stage, and the number of all its texts, including those that cannot be encoded."""

    encoded: tuple[Encoded, ...]
    number: int

    @property
    def tokens(self) -> int:
        """Number of tokens of all texts; a text that cannot be encoded counts as an average one."""
        return round(_n_tokens(self.encoded) / len(self.encoded) * self.number)

    def largest_batch(self, size: int, passes: int) -> list[Encoded]:
        """Return the batch with the most tokens among all random batches of `passes` passes."""
        draw, size = random.Random(0), min(size, self.number)
        batches = [draw.choices(self.encoded, k=size) for _ in range(passes * math.ceil(self.number / size))]
        return max(batches, key=_n_tokens)

    def fullest_row(self, size: int, room: int) -> list[Encoded]:
        """Return the texts of the scoring row that has the most tokens."""
        texts = dict(enumerate(self.encoded))
        return max(([texts[key] for key in row] for row in shared_rows(texts, size, room)), key=_n_tokens)


def _n_tokens(texts: Iterable[Encoded]) -> int:
    return sum(len(text.ids) for text in texts)


def loads_of(outline: Outline, stages: Stages, facts: FactSet, device: str) -> tuple[list[Load], list[str]]:
    """Return the load of each stage on a kind of device, in order, and notes on what was assumed."""
    notes: list[str] = []
    config = stages.config
    waiting = frozenset(facts.to_ask)  # old answers not known yet, assumed to be as long as the new ones
    old = [(f.prompt, f.ground_truth or f.target_new) for f in facts if f.ground_truth or f.id in waiting]
    new = [*[(f.prompt, f.target_new) for f in facts], *quiz_texts(outline.encoder, stages, list(facts))]
    read = [pair for fact in facts for pair in pairs_to_read(fact)]
    encoded = _encoded(outline.encoder, [*old, *new, *read])

    def texts(pairs: list[tuple[str, str]]) -> Texts:
        return Texts(tuple(encoded[pair] for pair in pairs if pair in encoded), len(pairs))

    if outline.encoder is None:
        notes.append(f"there is no tokenizer: {WORD_TOKENS} tokens per word are assumed")
    loads: list[Load] = []
    learned = texts(new)
    if stages.method.closed_form and outline.encoder is not None:
        learned = Texts(tuple(each.bare.tail for each in requests(outline.encoder, facts, ())), len(facts))
    may_hold = device == "cpu" and not config.model.shard
    for stage, own, passes, frozen in staged(stages, texts(old), learned):
        load, problem = _train_load(outline, stage, own, passes, frozen, may_hold)
        left = out_of_loras_reach(outline.skeleton().model, config.lora) if stage.kind.adapter else None
        if stage.name == "forget" and stage.kind.subtracts_from_base:
            # The subtraction also needs the base: on the CPU, or in a file if the CPU trains a large model.
            in_memory = stages.chooses_coefficient or load.weights_bytes < SMALL_BYTES
            size = load.weights_bytes
            load = replace(load, host_bytes=size) if in_memory else replace(load, base_bytes=size)
        loads.append(load)
        notes += [note for note in (left, problem) if note]
    if config.forget.only_known and stages.method.forgets and stages.teach is None:
        notes.append("forgetting takes only facts that the model holds (forget.only_known); all are counted here")
    if outline.encoder is not None and lessons.asks_base(config, outline.encoder):
        notes.append("the time leaves out asking the model for its own words, and training on what it is to keep")
    if stages.method.closed_form:
        notes.append("the time is that of the search for values, at most; second moments come on top")
    if config.evaluate.engine == "vllm":
        notes.append("answers are planned as those of transformers; vLLM uses all free memory of a GPU for a while")
    load, problem = _score_load(outline, stages, texts(read), facts, device)
    loads.append(load)
    notes += [problem] if problem else []
    return loads, list(dict.fromkeys(notes))


def quiz_texts(encoder: Encoder | None, stages: Stages, facts: Sequence[Fact]) -> list[tuple[str, str]]:
    """Return a question, with its answer, of each list of the quiz that learning trains on beside the facts."""
    if encoder is None or not lessons.has_quiz(stages.config):
        return []
    return [own[0][:2] for own in lessons.questions(facts, {}, stages.config.seed, encoder)]


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
    if not stages.method.closed_form:
        longer = QUIZ_EPOCHS if settings.ends_by_itself and lessons.has_quiz(stages.config) else 1
        return min(settings.most_epochs, round(settings.likely_epochs * longer))
    return settings.edit.most_steps * (settings.edit.contexts + 2)


def _train_load(
    outline: Outline,
    stage: Stage[TrainSettings],
    texts: Texts,
    passes: int,
    frozen: Sequence[TuningSettings],
    may_hold: bool,
) -> tuple[Load, str | None]:
    """Return the load of a stage, and why tracing its step failed (else None).

    `may_hold` tells whether the stage may hold a frozen base in bfloat16, see `training.precision`.
    """
    settings, kind = stage.settings, stage.kind
    skeleton = steps = outline.skeleton(outline.dtype if kind.adapter else torch.float32)
    held_bytes = 0  # of the base in bfloat16, beside its own weights
    if kind.adapter and may_hold and settings.dtype == "bfloat16" and outline.dtype == torch.float32:
        held_bytes, steps = skeleton.weights_bytes // 2, outline.skeleton(torch.bfloat16)
        steps.prepare(kind.name, settings, frozen)
        settings = settings.model_copy(update={"dtype": "float32"})  # for all that is not in bfloat16 anyway
    trained = skeleton.prepare(kind.name, settings, frozen)
    micro = settings.micro_batch_size or settings.batch_size
    step, problem = _traced(lambda: steps.train_step(texts.largest_batch(micro, passes), settings, pad_id=0))
    load = Load(
        name=stage.name,
        how=kind.name,
        texts=texts.number,
        tokens=texts.tokens,
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
    )
    return load, problem


def _score_load(outline: Outline, stages: Stages, read: Texts, facts: FactSet, device: str) -> tuple[Load, str | None]:
    """Return the load of scoring in all phases, with answers of full length, and why tracing failed (else None)."""
    settings = stages.config.evaluate
    size, longest, phases = settings.batch_size, settings.max_new_tokens, len(stages.phases)
    n_prompts = len({prompt for fact in facts for prompt in fact.prompts})
    batches = math.ceil(n_prompts / size) if "generate" in settings.protocols else 0
    rooms = [max(longest, len(text.answer_ids) + MARGIN_TOKENS) for text in read.encoded] or [longest]
    general = 2 * ROOM.tokens * math.ceil(len(measuring()) / size) if settings.general_prompts else 0
    skeleton = outline.skeleton(None if stages.method.makes_adapter or stages.method.in_context else torch.float32)
    row = read.fullest_row(size, ROW_TOKENS.get(device, GPU_ROW_TOKENS))
    step, problem = _traced(lambda: skeleton.read_step(row))
    if problem:  # a model that does not take such a mask
        step, problem = _traced(lambda: skeleton.read_step(row, shared=False))
    answers = None
    if batches or (stages.forget and stages.forget.settings.only_known):  # known facts are found by generation too
        widest = max(text.n_prompt_tokens for text in read.encoded)
        prompts = min(size, n_prompts)
        answers, problem = _traced(lambda: skeleton.answer_bytes(prompts, widest, max(rooms)))
    load = Load(
        name="score",
        how=f"{phases} phases",
        texts=read.number,
        tokens=read.tokens,
        passes=phases,
        batch_size=size,
        micro_batch_size=size,
        weights_bytes=skeleton.weights_bytes,
        step=step,
        answer_steps=round(phases * batches * sum(rooms) / len(rooms)) + general,
        answer_bytes=answers or 0,
    )
    return load, problem


def _traced(trace: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the result of `trace`, or why it failed: a forward pass may read values, and fake tensors have none."""
    try:
        return trace(), None
    except ForgetLearnError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        return None, f"a step of this model cannot be traced, so activations and time are left out: {reason}"


def _encoded(encoder: Encoder | None, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Encoded]:
    """Return the pairs that can be encoded, encoded; without a tokenizer return all, with guessed lengths."""
    if encoder is not None:
        return {p: text for p, text in encoder.encode_all(pairs, end=True).items() if isinstance(text, Encoded)}
    found = {}
    for pair in pairs:
        before, after = (max(1, round(WORD_TOKENS * len(text.split()))) for text in pair)
        found[pair] = Encoded((0,) * (1 + before + after + 1), 1 + before)
    return found
