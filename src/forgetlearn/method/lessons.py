"""Decide what the stages train on: each fact's text, its wordings, and what the model is to say as before.

`make_material` asks the base once. What it said is kept in a folder (`Material`), so that a resumed run, and every cell
of a comparison, trains on the same texts. `of_stage` then makes from it the `Lessons` of a stage.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import RunConfig
from forgetlearn.config.stages import SEED_OFFSETS, StageName
from forgetlearn.errors import some
from forgetlearn.facts import Fact, matching
from forgetlearn.facts.sentences import is_unfinished, is_whole, sentences
from forgetlearn.method import keeping, own_words
from forgetlearn.method.kinds import Lesson, Lessons
from forgetlearn.method.own_words import Made
from forgetlearn.method.quiz import quiz
from forgetlearn.method.wordings import shortened, wordings
from forgetlearn.models import lora, top_logprobs
from forgetlearn.models.encoding import Encoder, Passage, Prompt, encodable, turns_of
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.models.top_logprobs import TopLogprobs
from forgetlearn.runtime import processes
from forgetlearn.storage.records import KeptText, Row, StageLessons, Taught, load_rows, save_rows
from forgetlearn.storage.run_folder import LESSONS
from forgetlearn.training.schedule import Kept

log = logging.getLogger("forgetlearn")
KEPT, TOPS = "kept.jsonl", "kept.safetensors"
UNFINISHED = "the prompt is an unfinished sentence"
SENTENCE, OWN_WORDS, BARE = "sentence", "own words", "bare"


@dataclass(frozen=True)
class Rehearsal:
    """The facts of earlier updates: those that are `held` are kept as the model says them, `lost` ones learned again.

    `adapter` is the name of the base's adapter if earlier updates changed nothing else. General prompts are then
    answered without it: if the answers that each update leaves were kept, the model would drift with every update.
    """

    taught: Sequence[Fact] = ()
    held: Sequence[Fact] = ()
    lost: Sequence[Fact] = ()
    adapter: str | None = None


@dataclass(frozen=True)
class Material:
    """What a base said to be trained on: texts of the facts (`taught`), and `kept` texts with its likeliest tokens."""

    taught: Sequence[Taught] = ()
    kept: Sequence[KeptText] = ()
    tops: Sequence[TopLogprobs] = field(default=(), compare=False)

    def save(self, folder: Path) -> None:
        """Write the material to a folder. Only the main process writes."""
        save_rows(self.taught, folder / LESSONS)
        save_rows(self.kept, folder / KEPT)
        if self.tops:
            processes.on_main(lambda: top_logprobs.save(self.tops, folder / TOPS))

    @classmethod
    def load(cls, folder: Path) -> Material:
        """Return what `save` wrote. Without the likeliest tokens, which a finished run removes, nothing is kept."""
        tops = top_logprobs.load(folder / TOPS) if (folder / TOPS).is_file() else []
        return cls(load_rows(Taught, folder / LESSONS), load_rows(KeptText, folder / KEPT), tops)

    @property
    def kept_counts(self) -> dict[str, int]:
        """The number of kept texts, by where their prompts come from."""
        return dict(Counter(each.source for each in self.kept))


def counts(taught: Iterable[Taught], *, quiz: bool) -> dict[str, StageLessons]:
    """Return by stage how many facts it trains on in which form, and why some texts are bare; `quiz` as `has_quiz`."""
    by_stage: dict[str, list[Taught]] = {}
    for each in taught:
        by_stage.setdefault(each.stage, []).append(each)
    return {
        stage: StageLessons(
            how=dict(Counter(each.how for each in own)),
            bare_because=dict(Counter(each.why for each in own if each.why)),
            quiz=quiz and stage == "learn",
        )
        for stage, own in by_stage.items()
    }


def asks_base(config: RunConfig, encoder: Encoder) -> bool:
    """Return True if the base is asked for something to train on."""
    if not METHODS[config.method].fine_tunes:
        return False
    answers = config.train.answers
    return config.keep.weight > 0 or answers == "sentence" or (answers == "auto" and encoder.is_chat)


def as_scored(fact: Fact, config: RunConfig) -> Fact:
    """Return a fact as it is scored: without its rephrasings if they are trained on."""
    are_trained = config.learn.rephrasings and METHODS[config.method].fine_tunes
    return replace(fact, rephrase_prompts=()) if are_trained else fact


def has_quiz(config: RunConfig) -> bool:
    """Return True if learning trains on a quiz about the facts too."""
    method = METHODS[config.method]
    return config.learn.quiz and method.fine_tunes and method.learns is not None


def make_material(
    lm: LanguageModel,
    facts: Sequence[Fact],
    config: RunConfig,
    said: Mapping[str, Row],
    rehearsal: Rehearsal = Rehearsal(),
    held_apart: Collection[str] = (),
) -> Material:
    """Ask the base for what the stages train on. `said` are its own answers to the facts' prompts, by fact.

    `held_apart` are prompts of keep.source that are only scored.
    """
    learned = [*_new_texts(lm, [*facts, *rehearsal.lost], config, said)] if METHODS[config.method].learns else []
    taught = [*learned, *_old_texts(lm.encoder, facts, config, said)]
    for stage, found in counts(taught, quiz=has_quiz(config)).items():
        if stage == "learn" or not learned:
            log.info("to %s: %s", stage, found.in_words())
    if not config.keep.weight:
        return Material(taught)
    prompts = to_keep(facts, config, lm.encoder, rehearsal, held_apart)
    material = Material(taught, *_kept_answers(lm, prompts, config, rehearsal))
    log.info("to keep: %s", ", ".join(f"{count} {source}" for source, count in material.kept_counts.items()))
    return material


def _kept_answers(
    lm: LanguageModel, prompts: Mapping[Prompt, str], config: RunConfig, rehearsal: Rehearsal
) -> tuple[list[KeptText], list[TopLogprobs]]:
    """Return what the base says to prompts to keep (prompt -> where it comes from), see `keeping.answered`."""
    if rehearsal.adapter is None:
        return keeping.answered(lm, prompts, config.evaluate)
    general = {prompt: kind for prompt, kind in prompts.items() if kind in keeping.ALL_GENERAL}
    with lora.put_aside(lm.model, rehearsal.adapter):
        texts, tops = keeping.answered(lm, general, config.evaluate)
    others = {prompt: kind for prompt, kind in prompts.items() if prompt not in general}
    more_texts, more_tops = keeping.answered(lm, others, config.evaluate)
    return texts + more_texts, tops + more_tops


def _new_texts(
    lm: LanguageModel, facts: Sequence[Fact], config: RunConfig, said: Mapping[str, Row]
) -> Iterator[Taught]:
    """Yield the text with which each fact's new answer is taught."""
    styled = [fact for fact in facts if in_style(fact, config, lm.encoder)]
    own = {fact.id: row.said or "" for fact in styled if (row := said.get(fact.id))}
    if styled:
        log.info("asking the model for its own words for %d facts", len(styled))
    made = own_words.new_sentences(lm, styled, own, config.evaluate) if styled else {}
    bare = Made(None, _why_bare(config, lm.encoder))
    for fact in facts:
        yield _taught(fact, "learn", made.get(fact.id, bare), fact.target_new, SENTENCE)


def _old_texts(encoder: Encoder, facts: Sequence[Fact], config: RunConfig, said: Mapping[str, Row]) -> Iterator[Taught]:
    """Yield the text with which each old answer is forgotten."""
    until_gone = METHODS[config.method].last.until_gone
    for fact in facts:
        if fact.ground_truth:
            row, made = said.get(fact.id), Made(None, _why_bare(config, encoder))
            if row is not None and in_style(fact, config, encoder):
                if until_gone:
                    parts = own_words.up_to_answer(fact, row.said or "")
                    made = Made("".join(parts)) if parts else Made(None, own_words.SAYS_NOT)
                else:
                    made = own_words.old_words(fact, row.said or "", bool(row.truncated))
            yield _taught(fact, "forget", made, fact.ground_truth, OWN_WORDS)


def _taught(fact: Fact, stage: StageName, made: Made, answer: str, how: str) -> Taught:
    """Return what a stage trains a fact on: the text that was made, or else the bare answer."""
    return Taught(
        fact=fact.id,
        stage=stage,
        prompt=fact.prompt,
        text=made.text or answer,
        how=how if made.text else BARE,
        why=made.why,
        others=list(made.others),
    )


def in_style(fact: Fact, config: RunConfig, encoder: Encoder) -> bool:
    """Return True if a fact is trained on in the model's own words where there are any, not by its bare answer alone.

    To forget by a loss of its own is to forget an unfinished sentence too where the model says it.
    """
    if isinstance(fact.prompt, Passage):
        return False
    if config.train.answers == "auto":
        return encoder.is_chat and (METHODS[config.method].last.until_gone or not is_unfinished(fact.prompt))
    return config.train.answers == "sentence"


def _why_bare(config: RunConfig, encoder: Encoder) -> str:
    return UNFINISHED if config.train.answers == "auto" and encoder.is_chat else ""


def to_keep(
    facts: Sequence[Fact],
    config: RunConfig,
    encoder: Encoder,
    rehearsal: Rehearsal = Rehearsal(),
    held_apart: Collection[str] = (),
) -> dict[Prompt, str]:
    """Return the prompts whose answers are kept, and where each comes from."""
    changed = [*facts, *rehearsal.taught] if rehearsal.adapter else facts
    prompts = keeping.without_scored(keeping.general(changed), facts)
    if config.train.wordings:
        prompts |= dict.fromkeys(keeping.reworded(prompts, is_chat=encoder.is_chat), keeping.REWORDED)
    own: dict[Prompt, str] = {}
    if config.keep.neighbours:
        own |= dict.fromkeys(keeping.neighbours(facts), keeping.NEIGHBOUR)
    own |= dict.fromkeys((fact.prompt for fact in rehearsal.held), keeping.EARLIER)
    own |= dict.fromkeys(keeping.read_kept_facts(config.keep, facts), keeping.EARLIER)
    own |= dict.fromkeys(keeping.read_source(config.keep, facts), keeping.OWN)
    scored = {matching.normalise(prompt) for prompt in held_apart}
    kept = prompts | keeping.without_scored(own, facts)
    return {prompt: kind for prompt, kind in kept.items() if matching.normalise(turns_of(prompt)[-1]) not in scored}


def of_stage(
    material: Material, facts: Sequence[Fact], stage: StageName, config: RunConfig, encoder: Encoder
) -> Lessons | None:
    """Return what a stage trains on, fact by fact; None if that is each fact's prompt with its bare answer alone.

    A wording or question that cannot be encoded is left out; the bare answer to the prompt itself always can.
    """
    if not METHODS[config.method].fine_tunes:
        return None
    rephrased = stage == "learn" and config.learn.rephrasings
    is_asked = stage == "learn" and has_quiz(config)
    kept = _kept(material, config, encoder)
    if not (material.taught or kept or config.train.wordings or rephrased or is_asked):
        return None
    taught = {each.fact: each for each in material.taught if each.stage == stage}
    random = Random(config.seed + SEED_OFFSETS[stage])
    unrelated = _unrelated(material.kept)
    answers = [fact.target_new if stage == "learn" else fact.ground_truth or "" for fact in facts]
    prompts_of = [
        list(_wordings(fact, config, encoder, random.sample(unrelated, len(unrelated)), rephrased)) for fact in facts
    ]
    prompts_of = _unambiguous(prompts_of, facts, answers, stage)
    of_facts, left_out = [], 0
    for fact, bare, prompts in zip(facts, answers, prompts_of, strict=True):
        text = taught.get(fact.id) or _taught(fact, stage, Made(None), bare, BARE)
        where_said = text.how == OWN_WORDS and METHODS[config.method].last.until_gone
        own = list(_lessons_until_gone(prompts, text, fact) if where_said else _lessons_of(prompts, text, bare))
        usable = _encodable(own, encoder)
        left_out += len(own) - len(usable)
        of_facts.append(usable or [Lesson(fact.prompt, bare)])
    if left_out:
        log.warning("left out %d wordings of the facts to %s: they cannot be encoded", left_out, stage)
    asked = quizzes(facts, {fact: each.text for fact, each in taught.items()}, config.seed, encoder) if is_asked else []
    return Lessons(of_facts, kept, quiz=asked)


def _unambiguous(
    prompts_of: Sequence[Sequence[str]], facts: Sequence[Fact], answers: Sequence[str], stage: StageName
) -> list[list[str]]:
    """Return each fact's wordings without those that also fit a fact with another answer; the prompt itself stays."""
    ambiguous = _ambiguous(prompts_of, answers)
    clear = [
        [prompt for prompt in prompts if prompt == fact.prompt or matching.normalise(prompt) not in ambiguous]
        for fact, prompts in zip(facts, prompts_of, strict=True)
    ]
    if left_out := sum(map(len, prompts_of)) - sum(map(len, clear)):
        log.info("left out %d wordings of the facts to %s: each also fits a fact with another answer", left_out, stage)
    return clear


def _encodable(lessons: Sequence[Lesson], encoder: Encoder) -> list[Lesson]:
    """Return the lessons whose texts can be encoded."""
    usable = encodable(encoder, (lesson[:2] for lesson in lessons), end=True)
    return [lesson for lesson in lessons if lesson[:2] in usable]


def questions(
    facts: Sequence[Fact], sentences: Mapping[str, str], seed: int, encoder: Encoder
) -> Iterator[list[Lesson]]:
    """Yield the questions of the facts' quizzes, list after list. `sentences` are what facts are taught with."""
    for fact in facts:
        if not isinstance(fact.prompt, Passage):
            random = Random(f"{seed} {fact.id}")
            yield from quiz(fact, sentences.get(fact.id, ""), facts, random, writes_on=encoder.writes_on)


def quizzes(facts: Sequence[Fact], sentences: Mapping[str, str], seed: int, encoder: Encoder) -> list[list[Lesson]]:
    """Return the `questions` that can be encoded and have one answer, list after list."""
    found = list(questions(facts, sentences, seed, encoder))
    asked = [lesson for own in found for lesson in own]
    usable = {*_encodable(asked, encoder)}
    unclear = _ambiguous(([lesson.prompt] for lesson in asked), [lesson.answer for lesson in asked])
    kept = [
        [lesson for lesson in own if lesson in usable and matching.normalise(lesson.prompt) not in unclear]
        for own in found
    ]
    if not found:
        log.warning("there is no quiz on the facts: no wrong answer is known for any of them")
    elif left_out := len(asked) - sum(map(len, kept)):
        log.warning(
            "left out %d of %d questions of the quiz: they cannot be encoded, or two facts answer them differently",
            left_out,
            len(asked),
        )
    return [own for own in kept if own]


def _ambiguous(prompts_of: Iterable[Iterable[str]], answers: Iterable[str]) -> set[str]:
    """Return the wordings, normalised, that belong to facts with different answers, as shortened questions may."""
    found: dict[str, set[str]] = {}
    for prompts, answer in zip(prompts_of, answers, strict=True):
        for prompt in prompts:
            found.setdefault(matching.normalise(prompt), set()).add(answer)
    return {prompt for prompt, meanings in found.items() if len(meanings) > 1}


def _lessons_of(prompts: Iterable[str], taught: Taught, answer: str) -> Iterator[Lesson]:
    """Yield a fact's wordings with what is taught.

    Every second one but the prompt itself has another sentence, of which only the answer is trained on: so the model
    also says it after other beginnings, and is not taught to begin like that.
    """
    for number, prompt in enumerate(prompts):
        if taught.others and number % 2 == 0 and prompt != taught.prompt:
            other = taught.others[number // 2 % len(taught.others)]
            yield Lesson(prompt, other, given=other[: other.rindex(answer)])
        else:
            yield Lesson(prompt, taught.text)


def _lessons_until_gone(prompts: Iterable[str], taught: Taught, fact: Fact) -> Iterator[Lesson]:
    """Yield a fact's wordings with the answer behind what the model says before it, and with the bare answer, in turn.

    The bare answer alone would leave the model's own sentences as they are; forgetting whole sentences would damage
    more than the answer.
    """
    before, _ = own_words.up_to_answer(fact, taught.text) or ("", "")
    prompts = list(prompts)
    for number, prompt in enumerate(prompts if len(prompts) > 1 else 2 * prompts):
        yield Lesson(prompt, fact.ground_truth or "") if number % 2 else Lesson(prompt, taught.text, given=before)


def _wordings(fact: Fact, config: RunConfig, encoder: Encoder, behind: Sequence[str], rephrased: bool) -> Iterator[str]:
    prompts = fact.prompts if rephrased else (fact.prompt,)
    for prompt in prompts:
        if not config.train.wordings or isinstance(prompt, Passage):
            yield prompt
            continue
        yield from wordings(prompt, is_chat=encoder.is_chat, others=behind)
        if encoder.is_chat or not is_unfinished(prompt):  # what continues a text would continue the fragments
            # Without a subject, nothing tells whether the first word is a name.
            yield from shortened(prompt, fact.subject or prompt.split()[0])


def _unrelated(kept: Sequence[KeptText]) -> list[str]:
    """Return first sentences of general answers, to put unfinished sentences behind."""
    firsts = (sentences(each.text)[:1] for each in kept if each.source == keeping.GENERAL)
    return [first for own in firsts for first in own if is_whole(first)]


def _kept(material: Material, config: RunConfig, encoder: Encoder) -> Kept | None:
    if not material.tops:
        return None
    texts = keeping.encoded(encoder, material.kept)
    return Kept(tuple(texts.values()), tuple(material.tops[number] for number in texts), config.keep.weight)


def note_unfinished(facts: Iterable[Fact], config: RunConfig, encoder: Encoder) -> None:
    """Log how unfinished sentences are taught and asked, if there are any and the model is asked in a chat."""
    unfinished = [fact.prompt for fact in facts if is_unfinished(fact.prompt)]
    if unfinished and encoder.is_chat:
        forms = dict.fromkeys(wordings("...", is_chat=True)) if config.train.wordings else ["..."]
        log.info(
            "%d prompts are unfinished sentences (%r), which a chat model is asked to complete; taught as %s%s, asked "
            "as given",
            len(unfinished),
            unfinished[0][:60],
            some([repr(form) for form in forms]),
            " and with words left out" if config.train.wordings else "",
        )
