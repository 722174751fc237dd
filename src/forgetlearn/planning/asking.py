"""Count what an update asks the model: the texts that it reads and the prompts that it answers, by what they are for.

The prompts are those of the update itself, made by the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from forgetlearn.config.schema import RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.evaluation import damage, general_prompts, probe_scoring, probes, scoring
from forgetlearn.evaluation.general_ability import WINDOW
from forgetlearn.evaluation.generation import WORTH_CACHING, Room
from forgetlearn.facts import Fact, FactSet
from forgetlearn.method import keeping, lessons, own_words
from forgetlearn.models.batches import (
    GPU_ROW_TOKENS,
    ROUNDED_TO,
    ROW_TOKENS,
    common_length,
    sample_of,
    share,
    shared_rows,
)
from forgetlearn.models.encoding import Encoded, Encoder, P
from forgetlearn.planning.estimate import Asking, Load
from forgetlearn.planning.outline import Outline
from forgetlearn.planning.texts import (
    SAID,
    assumed_material,
    encoded,
    kept_texts,
    n_tokens,
    prompts_to_keep,
    with_answers,
)
from forgetlearn.planning.trace import traced

K = TypeVar("K")
# What SmolLM2-135M-Instruct said to 60 questions of ZsRE: for 18 % of the facts none of the sentences that are made of
# its answer was taken, so that it was asked for one; for most of these twice.
ASKED_FOR, ASKED_TWICE = 0.2, 0.15
# The texts on which a layout is tried are read alone, together, and twice where beginnings are shared.
TIMES_CHECKED = {"padded": 2, "shared": 3}


def ask_loads(outline: Outline, stages: Stages, facts: FactSet, device: str) -> tuple[list[Load], str | None]:
    """Return the loads of all that is asked beside training, and why a step could not be traced (else None)."""
    evaluate = stages.config.evaluate
    ask = questioner(outline, stages.config, device)
    skeleton = outline.skeleton(outline.computes_in(stages.method.last))
    pairs = list(dict.fromkeys(pair for fact in facts for pair in scoring.pairs_to_read(fact)))
    texts = encoded(outline.encoder, pairs)
    rows = shared_rows(texts, evaluate.batch_size, ROW_TOKENS.get(device, GPU_ROW_TOKENS))
    row = max(([texts[key] for key in own] for own in rows), key=n_tokens)
    step, problem = traced(lambda: skeleton.read_step(row))
    if problem:  # a model that does not take such a mask
        step, problem = traced(lambda: skeleton.read_step(row, shared=False))
    widest = max(text.n_prompt_tokens for text in texts.values())
    number = len({prompt for fact in facts for prompt in fact.prompts})
    answering, not_answered = traced(lambda: skeleton.answering(min(evaluate.batch_size, number), widest))
    asked = _asked(stages, list(facts), frozenset(facts.to_ask), ask) if ask else _guessed(texts, number, stages)
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
    size, room = min(number, evaluate.batch_size), evaluate.max_new_tokens
    width = max(len(text.ids) for text in texts.values())
    found = Asking(
        texts=phases * len(texts),
        read_tokens=phases * n_tokens(texts.values()),
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


def _asked(
    stages: Stages, facts: Sequence[Fact], waiting: frozenset[str], ask: Questioner
) -> Iterator[tuple[str, str, Asking]]:
    """Yield what the model is asked beside training: a name, when it is asked, and how much.

    `waiting` are facts whose old answers the model itself is to give.
    """
    config, evaluate, phases = stages.config, stages.config.evaluate, len(stages.phases)
    scored = [lessons.as_scored(fact, config) for fact in facts]
    after = _lengths_after(stages, scored, ask.encoder)
    once, free = ask.read_pairs(pair for fact in scored for pair in scoring.pairs_to_read(fact)), Asking()
    if "generate" in evaluate.protocols:
        rooms = _rooms(scored, config, ask.encoder)
        free = _times(ask.say(rooms), phases - 1) + ask.say(rooms, after)
    yield "score", f"{phases} phases", _times(once, phases) + free
    prompts = [fact for fact in facts if fact.id in waiting or "generate" not in evaluate.protocols]
    of_base = ask.say({fact.prompt: Room(evaluate.max_new_tokens) for fact in prompts})
    if lessons.asks_base(config, ask.encoder):
        if stages.method.learns:
            styled = [fact for fact in facts if fact.target_new and lessons.in_style(fact, config, ask.encoder)]
            of_base += _sentences(styled, ask)
        kept = prompts_to_keep(facts, config, ask.encoder)
        for tokens in sorted(set(keeping.KEPT_TOKENS.values())):
            own = [prompt for prompt, kind in kept.items() if keeping.KEPT_TOKENS[kind] == tokens]
            of_base += ask.say(dict.fromkeys(own, Room(tokens, tokens)))
        of_base += ask.read(kept_texts(kept, ask.encoder))
    if to_state := probes.to_state(scored, evaluate):
        of_base += _sentences(to_state, ask)
    if of_base.passes:
        yield "ask", "once", of_base
    if general := _general(config, ask):
        yield "general", "2 phases", _times(general, 2)
    if probes.are_asked(evaluate) and (probed := _probed(scored, config, ask)).passes:
        yield "probes", "2 phases", probed


@dataclass(frozen=True)
class Questioner:
    """Counts what it takes to ask a model with this tokenizer, `size` texts at once, on a kind of device."""

    encoder: Encoder
    size: int
    device: str

    def read(self, texts: Mapping[K, Encoded]) -> Asking:
        """Count the reading of texts, in rows that share beginnings, and the check of that layout."""
        if not texts:
            return Asking()
        rows = shared_rows(texts, self.size, ROW_TOKENS.get(self.device, GPU_ROW_TOKENS))
        tokens = sum(share([texts[key] for key in row], ROUNDED_TO).input_ids.numel() for row in rows)
        return Asking(texts=len(texts), read_tokens=tokens, rows=len(rows)) + self._check(texts.values(), "shared")

    def read_pairs(self, pairs: Iterable[tuple[P, str]]) -> Asking:
        """Count the reading of distinct prompts with answers."""
        found = self.encoder.encode_all(pairs)
        return self.read({pair: text for pair, text in found.items() if isinstance(text, Encoded)})

    def say(self, rooms: Mapping[P, Room], said: Callable[[P], int] | None = None) -> Asking:
        """Count the answers to prompts; `said` returns the tokens of one, which else nearly fills its room."""
        texts = with_answers(self.encoder, dict.fromkeys(rooms, 0))
        if not texts:
            return Asking()
        usual, found = min(room.tokens for room in rooms.values()), self._check(texts.values(), "padded")
        for is_wide in (False, True):
            own = sorted((p for p in texts if (rooms[p].tokens > usual) == is_wide), key=lambda p: len(texts[p].ids))
            for start in range(0, len(own), self.size):
                found += self._answered({p: texts[p] for p in own[start : start + self.size]}, rooms, said)
        return found

    def _answered(self, batch: Mapping[P, Encoded], rooms: Mapping[P, Room], said: Callable[[P], int] | None) -> Asking:
        """Count one batch: what all prompts begin with is read once, and it takes as long as its longest answer."""
        ids = [text.ids for text in batch.values()]
        width, shared, number = max(map(len, ids)), common_length(ids), len(ids)
        shared = shared if shared >= WORTH_CACHING and number > 1 else 0
        lengths = [min(rooms[p].tokens, said(p)) if said else SAID * rooms[p].tokens for p in batch]
        steps = max(lengths) if said else max(rooms[p].tokens for p in batch)
        read = number * (width - shared) + shared
        return Asking(
            prompts=number,
            prompt_tokens=read,
            batches=1,
            answer_tokens=sum(lengths),
            answer_steps=steps,
            context_tokens=sum(length * (width + length / 2) for length in lengths),
            most_read=read,
            most_held=number * (width + max(rooms[p].tokens for p in batch)),
        )

    def _check(self, texts: Iterable[Encoded], layout: str) -> Asking:
        sample = sample_of(list(texts))
        tokens = TIMES_CHECKED[layout] * n_tokens(sample)
        return Asking(read_tokens=tokens, rows=len(sample) + TIMES_CHECKED[layout] - 1)


def questioner(outline: Outline, config: RunConfig, device: str) -> Questioner | None:
    """Return what counts the asking of a model; None if it has no tokenizer."""
    return Questioner(outline.encoder, config.evaluate.batch_size, device) if outline.encoder else None


def _sentences(facts: Sequence[Fact], ask: Questioner) -> Asking:
    """Count what it takes to find sentences in the model's own words: comparing some, and asking where none is taken.

    The model is assumed to answer with the fact's prompt.
    """
    tried = own_words.to_read(facts, {fact.id: f"{fact.prompt} {fact.target_new}" for fact in facts})
    found = ask.read_pairs(tried.values())
    for instruction, part in zip(own_words.INSTRUCTIONS, (ASKED_FOR, ASKED_TWICE), strict=True):
        left = facts[: math.ceil(part * len(facts))]
        found += ask.say({own_words.telling(fact, instruction): own_words.room(ask.encoder, fact) for fact in left})
    return found


def _rooms(facts: Sequence[Fact], config: RunConfig, encoder: Encoder) -> dict[str, Room]:
    usual = dict.fromkeys((p for fact in facts for p in fact.prompts), Room(config.evaluate.max_new_tokens))
    return {**usual, **scoring.answer_rooms(encoder, facts, config.evaluate)}


def _lengths_after(stages: Stages, facts: Sequence[Fact], encoder: Encoder) -> Callable[[str], int] | None:
    """Return the tokens of the updated model's answers to the facts' prompts: those of what it was taught."""
    if not stages.method.learns:
        return None
    material, room = assumed_material(facts, stages.config, encoder), stages.config.evaluate.max_new_tokens
    taught = {each.fact: (each.prompt, each.text) for each in material.taught if each.stage == "learn"}
    texts = encoder.encode_all(taught.values(), end=True)
    lengths: dict[str, int] = {}
    for fact in facts:
        text = texts.get(taught[fact.id]) if fact.id in taught else None
        lengths |= dict.fromkeys(fact.prompts, len(text.answer_ids) if isinstance(text, Encoded) else room)
    return lengths.__getitem__


def _general(config: RunConfig, ask: Questioner) -> Asking | None:
    """Count one phase of general ability; None if it is not measured. Tasks are not counted."""
    evaluate, found = config.evaluate, Asking()
    if evaluate.general_prompts:
        rooms = dict.fromkeys(general_prompts.measuring(), damage.ROOM)
        found += ask.say(rooms)
        found += ask.read(with_answers(ask.encoder, dict.fromkeys(rooms, round(SAID * damage.ROOM.tokens))))
    if evaluate.general is not None:
        found += Asking(texts=1, read_tokens=evaluate.general_tokens, rows=math.ceil(evaluate.general_tokens / WINDOW))
    return found if found.passes else None


def _probed(facts: Sequence[Fact], config: RunConfig, ask: Questioner) -> Asking:
    """Count the probes before and after the update."""
    stated = {fact.id: fact.prompt for fact in probes.to_state(facts, config.evaluate)}  # about as long
    asked = probes.questions(facts, ask.encoder, config.evaluate, config.seed, stated)
    chosen = [each for each in asked if each.options]
    once = ask.read_pairs((each.prompt, option) for each in chosen for option in each.options)
    usual = Room(config.evaluate.max_new_tokens)
    for own in probe_scoring.by_beginning([each for each in asked if not each.options]):
        rooms = dict.fromkeys((each.prompt for each in own), usual)
        once += ask.say({**rooms, **probe_scoring.rooms(ask.encoder, own, config.evaluate)})
    return _times(once, 2)


def _times(asking: Asking, number: int) -> Asking:
    found = Asking()
    for _ in range(number):
        found += asking
    return found
