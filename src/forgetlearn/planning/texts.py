"""Make the texts that an update trains on and keeps, without a model: what it would say is assumed (docs/plan.md)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from forgetlearn.config.schema import RunConfig
from forgetlearn.config.stages import StageName, Stages
from forgetlearn.errors import FactError
from forgetlearn.facts import Fact, FactSet
from forgetlearn.method import keeping, lessons
from forgetlearn.method.kinds import Lessons
from forgetlearn.method.targets import requests
from forgetlearn.models.batches import WORTH_SHARING, common_length
from forgetlearn.models.encoding import Encoded, Encoder, P, Prompt
from forgetlearn.storage.records import KeptText, Taught
from forgetlearn.training.schedule import KEPT_SHARE

# SmolLM2-135M-Instruct's answers to 60 questions of ZsRE and to general prompts filled 90 to 95 % of their room.
SAID = 0.95
WORD_TOKENS = 1.5  # tokens per word if there is no tokenizer


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
        largest = max(batches, key=n_tokens)
        room = max(KEPT_SHARE * n_tokens(largest), *(len(text.ids) for text in self.kept)) if self.kept else 0
        for text in self.kept:
            room -= len(text.ids)
            largest += [text] if room >= 0 else []
        return largest


def n_tokens(texts: Iterable[Encoded]) -> int:
    """Return the number of tokens of all texts together."""
    return sum(len(text.ids) for text in texts)


def _mean(texts: Sequence[Encoded]) -> float:
    return n_tokens(texts) / len(texts)


def texts_of(encoder: Encoder | None, stages: Stages, facts: FactSet) -> tuple[Texts, Texts]:
    """Return what is trained on with the old answers and with the new ones."""
    waiting = frozenset(facts.to_ask)  # old answers not known yet, assumed to be as long as the new ones
    old = {
        fact.id: replace(fact, ground_truth=fact.ground_truth or fact.target_new)
        for fact in facts
        if fact.ground_truth or fact.id in waiting
    }
    new = list(facts) if stages.method.learns else []
    if encoder is not None and stages.method.closed_form:
        edited = tuple((each.bare.tail,) for each in requests(encoder, new, ()))
        return _bare(encoder, old.values(), "forget"), Texts(edited, len(new))
    if encoder is None or not stages.method.fine_tunes:
        return _bare(encoder, old.values(), "forget"), _bare(encoder, new, "learn")
    material = assumed_material([old.get(fact.id, fact) for fact in facts], stages.config, encoder)
    kept = tuple(kept_texts(prompts_to_keep(list(facts), stages.config, encoder), encoder).values())

    def of_stage(stage: StageName, own: Sequence[Fact]) -> Texts:
        made = lessons.of_stage(material, own, stage, stages.config, encoder) if own else None
        return _bare(encoder, own, stage) if made is None else replace(_encoded_lists(encoder, made), kept=kept)

    return of_stage("forget", [*old.values()]), of_stage("learn", new)


def _encoded_lists(encoder: Encoder, made: Lessons) -> Texts:
    texts = encoder.encode_all((lesson[:2] for own in made.lists for lesson in own), end=True)
    lists = [[text for lesson in own if isinstance(text := texts[lesson[:2]], Encoded)] for own in made.lists]
    return Texts(tuple(tuple(own) for own in lists if own), len(lists))


def _bare(encoder: Encoder | None, facts: Iterable[Fact], stage: StageName) -> Texts:
    """Return the facts' prompts with their bare answers: the old ones to forget, the new ones to learn."""
    pairs = [(fact.prompt, (fact.ground_truth or "") if stage == "forget" else fact.target_new) for fact in facts]
    texts = encoded(encoder, pairs)
    return Texts(tuple((texts[pair],) for pair in pairs if pair in texts), len(pairs))


def encoded(encoder: Encoder | None, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Encoded]:
    """Return the pairs that can be encoded, encoded; without a tokenizer return all, with guessed lengths."""
    if encoder is not None:
        return {p: text for p, text in encoder.encode_all(pairs, end=True).items() if isinstance(text, Encoded)}
    found = {}
    for pair in pairs:
        before, after = (max(1, round(WORD_TOKENS * len(text.split()))) for text in pair)
        found[pair] = Encoded((0,) * (1 + before + after + 1), 1 + before)
    return found


def counts_of(encoder: Encoder | None, stages: Stages, facts: FactSet) -> tuple[Texts, Texts]:
    """Return only the numbers of what `texts_of` returns."""
    held = len(facts.to_ask) + sum(1 for fact in facts if fact.ground_truth)  # can be forgotten if the model holds it
    asked = []
    if encoder is not None and lessons.has_quiz(stages.config):
        asked = [*lessons.questions(list(facts), {}, stages.config.seed, encoder)]
    return Texts((), held), Texts((), len(facts) + len(asked))


def assumed_material(facts: Iterable[Fact], config: RunConfig, encoder: Encoder) -> lessons.Material:
    """Return what the base is assumed to say: for a fact in its own words, the prompt and the answer in a row.

    The sentences of SmolLM2-135M-Instruct were 7 % shorter than that.
    """
    taught = []
    for fact in facts:
        styled = lessons.in_style(fact, config, encoder)
        for stage, answer, how in (
            ("learn", fact.target_new, lessons.SENTENCE),
            ("forget", fact.ground_truth, lessons.OWN_WORDS),
        ):
            if answer:
                text, how = (f"{fact.prompt} {answer}", how) if styled else (answer, lessons.BARE)
                taught.append(Taught(fact=fact.id, stage=stage, prompt=fact.prompt, text=text, how=how))
    behind = "Many people like to read books and to go for a walk."  # a sentence of a general answer
    kept = [KeptText(prompt="Hello!", text=behind, ends=True, source=keeping.GENERAL)] if config.keep.weight else []
    return lessons.Material(taught, kept)


def prompts_to_keep(facts: Sequence[Fact], config: RunConfig, encoder: Encoder) -> dict[Prompt, str]:
    """Return the prompts whose answers are kept, and where each comes from; none if the base is not asked."""
    if not config.keep.weight or not lessons.asks_base(config, encoder):
        return {}
    return lessons.to_keep(facts, config, encoder)


def kept_texts(prompts: Mapping[Prompt, str], encoder: Encoder) -> dict[Prompt, Encoded]:
    """Return the `prompts_to_keep` with answers as long as the base's are assumed to be."""
    return with_answers(encoder, {prompt: round(SAID * keeping.KEPT_TOKENS[kind]) for prompt, kind in prompts.items()})


def with_answers(encoder: Encoder, lengths: Mapping[P, int]) -> dict[P, Encoded]:
    """Return the prompts with answers of these lengths, in tokens; leave out those that the model cannot be asked."""
    found: dict[P, Encoded] = {}
    for prompt, length in lengths.items():
        try:
            ids = tuple(encoder.prompt_ids(prompt))
        except FactError:
            continue
        found[prompt] = Encoded((*ids, *ids[-1:] * length), len(ids))
    return found
