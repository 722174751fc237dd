"""Compute the load of every stage from a config and facts: its texts, and one traced step."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from forgetlearn.config.schema import RunConfig, TrainSettings, TuningSettings
from forgetlearn.config.stages import Stage, StageName, Stages
from forgetlearn.errors import ForgetLearnError
from forgetlearn.evaluation.scoring import pairs_to_read
from forgetlearn.facts import Fact, FactSet
from forgetlearn.method import lessons
from forgetlearn.method.checks import out_of_loras_reach
from forgetlearn.method.kinds import Lessons
from forgetlearn.method.targets import requests
from forgetlearn.models.batches import (
    GPU_ROW_TOKENS,
    ROW_TOKENS,
    WORTH_SHARING,
    common_length,
    sample_of,
    shared_rows,
)
from forgetlearn.models.encoding import Encoded, Encoder
from forgetlearn.models.null_space import MOST_TOKENS
from forgetlearn.planning.asking import Questioner, asked_of, kept_texts, prompts_to_keep, stand_ins
from forgetlearn.planning.estimate import FLOAT32, Asking, Load, Step
from forgetlearn.planning.outline import Outline
from forgetlearn.training import precision
from forgetlearn.training.schedule import KEPT_SHARE
from forgetlearn.weights.task_vector import SMALL_BYTES

T = TypeVar("T")
# How often learning visits a text until it ends by itself. SmolLM2-135M with its facts taught in several wordings: 9 to
# 14 times in 19 of 22 runs (2 to 60 facts), 20 in the others. In one wording: 6 to 12 times in 15 of 23 runs, 4 to 5 in
# those of ten facts each, 16 with ft-c. SPREAD holds 19 of the 22 and 12 of the 23. Left out: trials of other sentences
# (13 to 165 times), locft (all its epochs) and the one run with a quiz (11).
VISITS = {True: 12, False: 8}
SPREAD = (0.7, 1.4)
FEWEST_UNTIL_GONE = 0.6  # eight capitals were gone after 13 steps of 20 planned
WORD_TOKENS = 1.5  # tokens per word if there is no tokenizer
CHECKED = 7  # times that the texts on which the layout of training is tried are read


@dataclass(frozen=True)
class Texts:
    """The encoded texts of a stage in `number` lists, of which each visit shows one text, and those that are kept.

    A list that cannot be encoded counts as an average one.
    """

    lists: tuple[tuple[Encoded, ...], ...]
    number: int
    kept: tuple[Encoded, ...] = ()

    @property
    def encoded(self) -> tuple[Encoded, ...]:
        """All texts but those that are kept."""
        return tuple(text for own in self.lists for text in own)

    @property
    def tokens(self) -> int:
        """Number of tokens of one text of each list."""
        return round(sum(_mean(own) for own in self.lists) / max(1, len(self.lists)) * self.number)

    def computed(self, size: int, *, shares: bool) -> int:
        """Return the tokens of an epoch, with those of kept texts; if it `shares`, a step reads a beginning once."""
        common = common_length([text.ids for text in (*self.encoded, *self.kept)])
        if not shares or common < WORTH_SHARING * self.tokens / max(1, self.number):
            common = 0
        steps, own = math.ceil(self.number / size), self.tokens - common * self.number
        kept = max(KEPT_SHARE * own, steps * (_mean(self.kept) - common)) if self.kept else 0
        return round(own + kept + steps * common)

    def largest_batch(self, size: int, passes: int) -> list[Encoded]:
        """Return the batch with the most tokens among all random batches of `passes` passes, with its kept texts."""
        draw, size, texts = random.Random(0), min(size, self.number), self.encoded
        batches = [draw.choices(texts, k=size) for _ in range(passes * math.ceil(self.number / size))]
        largest = max(batches, key=_n_tokens)
        room = max(KEPT_SHARE * _n_tokens(largest), *map(_length, self.kept)) if self.kept else 0
        for text in self.kept:
            room -= len(text.ids)
            largest += [text] if room >= 0 else []
        return largest


def _length(text: Encoded) -> int:
    return len(text.ids)


def _n_tokens(texts: Iterable[Encoded]) -> int:
    return sum(map(_length, texts))


def _mean(texts: Sequence[Encoded]) -> float:
    return _n_tokens(texts) / len(texts)


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
    asked, problem = _ask_loads(outline, stages, facts, device)
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
    config, ask = stages.config, _questioner(outline, stages.config, device)
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


def texts_of(encoder: Encoder | None, stages: Stages, facts: FactSet) -> tuple[Texts, Texts]:
    """Return what is trained on with the old answers and with the new ones."""
    waiting = frozenset(facts.to_ask)  # old answers not known yet, assumed to be as long as the new ones
    of_old = {
        fact.id: replace(fact, ground_truth=fact.ground_truth or fact.target_new)
        for fact in facts
        if fact.ground_truth or fact.id in waiting
    }
    facts_old, facts_new = [*of_old.values()], list(facts) if stages.method.learns else []
    if encoder is None or not stages.method.fine_tunes:
        bare = _bare(encoder, [(fact.prompt, fact.ground_truth or "") for fact in facts_old])
        return bare, _new_bare(encoder, stages, facts_new)
    material = stand_ins([of_old.get(fact.id, fact) for fact in facts], stages.config, encoder)
    kept = tuple(kept_texts(prompts_to_keep(list(facts), stages.config, encoder), encoder).values())
    found = []
    both: tuple[tuple[StageName, list[Fact]], ...] = (("forget", facts_old), ("learn", facts_new))
    for name, own in both:
        lists = lessons.of_stage(material, own, name, stages.config, encoder) if own else None
        if lists is None:
            pairs = [(f.prompt, (f.ground_truth or "") if name == "forget" else f.target_new) for f in own]
            found.append(_bare(encoder, pairs))
        else:
            found.append(replace(_encoded_lists(encoder, lists), kept=kept))
    old, new = found
    return old, new


def _encoded_lists(encoder: Encoder, made: Lessons) -> Texts:
    texts = encoder.encode_all((lesson[:2] for own in made.lists for lesson in own), end=True)
    lists = [[text for lesson in own if isinstance(text := texts[lesson[:2]], Encoded)] for own in made.lists]
    return Texts(tuple(tuple(own) for own in lists if own), len(lists))


def _bare(encoder: Encoder | None, pairs: Sequence[tuple[str, str]]) -> Texts:
    texts = _encoded(encoder, list(pairs))
    return Texts(tuple((texts[pair],) for pair in pairs if pair in texts), len(pairs))


def _new_bare(encoder: Encoder | None, stages: Stages, facts: Sequence[Fact]) -> Texts:
    if stages.method.closed_form and encoder is not None:
        return Texts(tuple((each.bare.tail,) for each in requests(encoder, facts, ())), len(facts))
    return _bare(encoder, [(fact.prompt, fact.target_new) for fact in facts])


def counts_of(encoder: Encoder | None, stages: Stages, facts: FactSet) -> tuple[Texts, Texts]:
    """Return only the numbers of what `texts_of` returns."""
    held = len(facts.to_ask) + sum(1 for fact in facts if fact.ground_truth)  # can be forgotten if the model holds it
    asked = []
    if encoder is not None and lessons.has_quiz(stages.config):
        asked = [*lessons.questions(list(facts), {}, stages.config.seed, encoder)]
    return Texts((), held), Texts((), len(facts) + len(asked))


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
    step, problem = _traced(lambda: steps.train_step(texts.largest_batch(micro, passes), settings, pad_id=0))
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
    asking = Asking(read_tokens=CHECKED * _n_tokens(sample), rows=CHECKED + len(sample))
    settings = stage.settings
    if stage.kind.adapter and isinstance(settings, TuningSettings) and texts.kept and settings.lora.null_space:
        for own in (texts.kept, texts.encoded):
            drawn = [own[index] for index in range(min(len(own), MOST_TOKENS * len(own) // _n_tokens(own)))]
            asking += ask.read(dict(enumerate(drawn)))
    return replace(load, asking=asking, read=read)


def _questioner(outline: Outline, config: RunConfig, device: str) -> Questioner | None:
    return Questioner(outline.encoder, config.evaluate.batch_size, device) if outline.encoder else None


def _ask_loads(outline: Outline, stages: Stages, facts: FactSet, device: str) -> tuple[list[Load], str | None]:
    """Return the loads of all that is asked beside training, and why a step could not be traced (else None)."""
    evaluate, ask = stages.config.evaluate, _questioner(outline, stages.config, device)
    skeleton = outline.skeleton(outline.computes_in(stages.method.last))
    pairs = list(dict.fromkeys(pair for fact in facts for pair in pairs_to_read(fact)))
    texts = _encoded(outline.encoder, pairs)
    rows = shared_rows(texts, evaluate.batch_size, ROW_TOKENS.get(device, GPU_ROW_TOKENS))
    row = max(([texts[key] for key in own] for own in rows), key=_n_tokens)
    step, problem = _traced(lambda: skeleton.read_step(row))
    if problem:  # a model that does not take such a mask
        step, problem = _traced(lambda: skeleton.read_step(row, shared=False))
    widest = max(text.n_prompt_tokens for text in texts.values())
    number = len({prompt for fact in facts for prompt in fact.prompts})
    answering, not_answered = _traced(lambda: skeleton.answering(min(evaluate.batch_size, number), widest))
    asked = asked_of(stages, list(facts), frozenset(facts.to_ask), ask) if ask else _guessed(texts, number, stages)
    loads = [
        Load(
            name=name,
            how=how,
            texts=asking.texts + asking.prompts,
            tokens=0,
            passes=1,
            batch_size=evaluate.batch_size,
            micro_batch_size=evaluate.batch_size,
            weights_bytes=skeleton.weights_bytes,
            step=step,
            asking=asking,
            answering=answering,
        )
        for name, how, asking in asked
    ]
    return loads, problem or not_answered


def _guessed(
    texts: Mapping[tuple[str, str], Encoded], number: int, stages: Stages
) -> Iterator[tuple[str, str, Asking]]:
    """Yield the scoring alone, of a model without a tokenizer; `number` prompts are as long as the longest text."""
    evaluate, phases = stages.config.evaluate, len(stages.phases)
    size, room, width = min(number, evaluate.batch_size), evaluate.max_new_tokens, max(map(_length, texts.values()))
    found = Asking(
        texts=phases * len(texts),
        read_tokens=phases * _n_tokens(texts.values()),
        rows=phases * math.ceil(len(texts) / evaluate.batch_size),
    )
    if "generate" in evaluate.protocols:
        batches = phases * math.ceil(number / size)
        found += Asking(
            prompts=phases * number,
            prompt_tokens=phases * number * width,
            batches=batches,
            answer_tokens=phases * number * room,
            answer_steps=batches * room,
            context_tokens=phases * number * room * (width + room / 2),
            most_read=size * width,
            most_held=size * (width + room),
        )
    yield "score", f"{phases} phases", found


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
