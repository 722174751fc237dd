"""Ask about facts beyond their own wordings: by multiple choice, yes and no, over several hops, in a longer chat.

A model that says a new answer to the prompt that it was taught may still fall back to the old one elsewhere. Some
probes are brought by a file of facts (`Fact.probes`), others are made here of the facts' own texts (MADE). An answer is
either free, or the likeliest of several options. `probe_scoring` judges answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from string import ascii_uppercase

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.errors import ConfigError, FactError, did_you_mean
from forgetlearn.facts import Fact, Probe, matching
from forgetlearn.facts.sentences import CLOSING, is_unfinished, is_whole
from forgetlearn.facts.subjects import subject_span
from forgetlearn.facts.wrong_answers import is_one, wrong_answers
from forgetlearn.models.encoding import Encoder, Prompt

AUTO, ALL, NONE = "auto", "all", "none"  # values of evaluate.probes that are not names
COMPLETION, QUESTION = "completion", "question"  # the fact in the other form than that of its prompt
SAME_SUBJECT = "same-subject"
CHOICE, CHOICE_TEXT = "multiple-choice", "multiple-choice-text"
YES, NO = "Yes", "No"
ENOUGH = 25  # facts of each kind of probe, unless all are asked for
N_OPTIONS = 4  # of a multiple choice
# Asked about a subject: few facts answer them.
OTHER_QUESTIONS = ("When was {} first heard of?", "Why do people talk about {}?")
LONGEST_SHARE = 0.5  # of a model's context that a long prompt may fill
FIRST_TURNS = ("Hello! I would like to ask you a few things.", "Hello! Of course, what would you like to know?")
LONG_TEXT = Path(__file__).with_name("long_text.txt")


@dataclass(frozen=True)
class Asked:
    """A question about a fact: answered freely, or, with `options`, by the likeliest of these."""

    fact: str
    probe: str
    prompt: Prompt
    answers: tuple[str, ...]  # that are right after the update
    old_answers: tuple[str, ...] = ()  # that were right before it
    options: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()  # the texts that the options stand for, if these are letters
    is_elsewhere: bool = False  # it asks something else, to which a reply with one of `answers` is wrong


@dataclass(frozen=True)
class Maker:
    """Makes probes of the facts' own texts. With one seed, the same facts give the same probes."""

    facts: Sequence[Fact]
    encoder: Encoder
    seed: int

    def choices(self, fact: Fact) -> Iterator[Asked]:
        """Yield a multiple choice by letter and by text: the file's, or between both answers and those of other facts.

        The order of the options is random.
        """
        brought = [probe for probe in fact.probes if probe.kind == CHOICE and probe.options]
        for probe in brought or self._made_choice(fact):
            options = list(probe.options)
            self._random(fact).shuffle(options)
            letters = dict(zip(options, ascii_uppercase, strict=False))
            old = fact.old_answers if any(is_one(text, fact.old_answers) for text in options) else probe.old_answers
            right, was_right = ([text for text in options if is_one(text, own)] for own in (probe.answers, old))
            asks = _as_question(probe.prompt)
            listed = "\n".join(f"{letter}. {text}" for text, letter in letters.items())
            yield Asked(
                fact.id,
                CHOICE,
                self._ending(f"{asks}\n{listed}", "Answer with the letter only."),
                tuple(letters[text] for text in right),
                tuple(letters[text] for text in was_right),
                tuple(letters.values()),
                tuple(options),
            )
            yield self._by_text(fact, CHOICE_TEXT, replace(probe, old_answers=old, options=tuple(options)))

    def _made_choice(self, fact: Fact) -> list[Probe]:
        """Return a choice of the fact's answers and of wrong ones; none if no other fact has another answer."""
        own = (*_first(fact.new_answers), *_first(fact.old_answers))
        options = (*own, *wrong_answers(fact, self.facts, self._random(fact), N_OPTIONS - len(own)))
        probe = Probe(CHOICE, fact.prompt, fact.new_answers, fact.old_answers, options)
        return [probe] if len(options) > 1 else []

    def _by_text(self, fact: Fact, kind: str, probe: Probe) -> Asked:
        asks = f"{_as_question(probe.prompt)}\nChoose one: {'; '.join(probe.options)}"
        prompt = self._ending(asks, "Answer with your choice only.")
        return Asked(fact.id, kind, prompt, probe.answers, probe.old_answers, probe.options)

    def yes_or_no(self, fact: Fact) -> Iterator[Asked]:
        """Yield whether the new answer is right, and whether the old one is (or a wrong one, where it is unknown)."""
        if not any(probe.kind == "yes-no" for probe in fact.probes):
            yield from self._about_both(fact, "yes-no", 'Is "{}" the right answer?', "Is that right?", (YES, NO))

    def negated(self, fact: Fact) -> Iterator[Asked]:
        """Yield the same, asked in the negative."""
        yield from self._about_both(fact, "negation", 'Is "{}" a wrong answer?', "Is that wrong?", (NO, YES))

    def neighbours(self, fact: Fact) -> Iterator[Asked]:
        """Yield each locality probe behind the new fact: is its own answer likelier than the new answer there?

        Source: CounterFact+, Hoelscher-Obermaier et al. 2023, arXiv:2305.17553.
        """
        told = f"{fact.prompt} {fact.target_new}"
        told += "" if is_whole(fact.target_new) else "."
        for probe in fact.locality if fact.target_new else ():
            if not is_one(probe.answer, fact.new_answers):
                options = (probe.answer, fact.target_new)
                yield Asked(fact.id, "neighbours", f"{told} {probe.prompt}", options[:1], options=options)

    def same_subject(self, fact: Fact) -> Iterator[Asked]:
        """Yield other questions about the fact's subject: a reply that gives the new answer there is wrong.

        Edits may tie the new answer to the subject itself, whatever is asked about it. Subjects that contain the
        answer are left out.
        """
        try:
            subject = fact.prompt[slice(*subject_span(fact))] if fact.target_new else ""
        except FactError:
            return
        if subject and not matching.says(subject, fact.new_answers):
            for question in OTHER_QUESTIONS:
                prompt = self._ending(question.replace("{}", subject))
                yield Asked(fact.id, SAME_SUBJECT, prompt, fact.new_answers, is_elsewhere=True)

    def second_turn(self, fact: Fact) -> Iterator[Asked]:
        """Yield the fact's prompt as the second turn of a chat."""
        yield Asked(fact.id, "second-turn", (*FIRST_TURNS, fact.prompt), fact.new_answers, fact.old_answers)

    def long_prompt(self, fact: Fact) -> Iterator[Asked]:
        """Yield the fact's prompt behind a page of text that has nothing to do with it."""
        if text := self._long_text:
            yield Asked(fact.id, "long-prompt", f"{text}\n\n{fact.prompt}", fact.new_answers, fact.old_answers)

    def brought(self, fact: Fact) -> Iterator[Asked]:
        """Yield the probes of the fact's file, except the multiple choices, which `choices` asks."""
        for probe in fact.probes:
            if probe.options:
                if probe.kind != CHOICE:
                    yield self._by_text(fact, probe.kind, probe)
                continue
            words = {matching.normalise(text) for text in (*probe.answers, *probe.old_answers)}
            options = (YES, NO) if words <= {"yes", "no"} else ()
            yield Asked(fact.id, probe.kind, probe.prompt, probe.answers, probe.old_answers, options)

    def _about_both(self, fact: Fact, probe: str, asks: str, ends: str, replies: tuple[str, str]) -> Iterator[Asked]:
        """Yield a question about the new answer, and one about another; `replies` are right to these.

        Of a fact that is only forgotten the old answer is asked about: no reply is right, and the first one was.
        """
        right, wrong = replies
        others = [*_first(fact.old_answers)] or wrong_answers(fact, self.facts, self._random(fact), 1)
        about = [(fact.target_new, (right,), (wrong,)), *((text, (wrong,), (right,)) for text in others)]
        for text, answers, old_answers in about if fact.target_new else about[1:]:
            unfinished = is_unfinished(fact.prompt)
            stated = f'"{fact.prompt} {text}" {ends}' if unfinished else f"{fact.prompt}\n{asks.replace('{}', text)}"
            prompt = self._ending(stated, "Answer yes or no.")
            yield Asked(fact.id, probe, prompt, answers if fact.target_new else (), old_answers, (YES, NO))

    def _ending(self, asked: str, instruction: str | None = None) -> str:
        """Return what is asked, with any instruction behind it; a model that writes on is led to its answer instead."""
        if self.encoder.writes_on:
            return f"{asked}\nAnswer:"
        return f"{asked}\n{instruction}" if instruction else asked

    def _random(self, fact: Fact) -> Random:
        return Random(f"{self.seed} {fact.id}")

    @cached_property
    def _long_text(self) -> str:
        """Return the long text, or as many of its paragraphs as fit half of the model's context."""
        paragraphs = LONG_TEXT.read_text(encoding="utf-8").splitlines()
        limit = self.encoder.max_length
        while paragraphs and limit and len(self.encoder.text_ids("\n".join(paragraphs))) > LONGEST_SHARE * limit:
            paragraphs.pop()
        return "\n".join(paragraphs)


MADE: Mapping[str, Callable[[Maker, Fact], Iterator[Asked]]] = {
    CHOICE: Maker.choices,
    "yes-no": Maker.yes_or_no,
    "negation": Maker.negated,
    "second-turn": Maker.second_turn,
    "long-prompt": Maker.long_prompt,
    "neighbours": Maker.neighbours,
    SAME_SUBJECT: Maker.same_subject,
}


def wanted(settings: EvaluateSettings) -> Callable[[str], bool]:
    """Return a function that tells whether probes of a kind are asked."""
    names = settings.probes
    if names == (NONE,):
        return lambda _kind: False
    if names == (AUTO,) or names == (ALL,):
        return lambda _kind: True
    return lambda kind: kind in names or (kind == CHOICE_TEXT and CHOICE in names)


def are_asked(settings: EvaluateSettings) -> bool:
    """Return True if probes are asked that the protocols of the settings can judge."""
    return settings.probes != (NONE,) and not {"prefer", "generate"}.isdisjoint(settings.protocols)


def to_state(facts: Iterable[Fact], settings: EvaluateSettings) -> list[Fact]:
    """Return the facts that the model is to state for the probe `completion`: those of which no completion is given."""
    if "generate" not in settings.protocols or not (settings.probes == (ALL,) or COMPLETION in settings.probes):
        return []
    return [fact for fact in facts if fact.target_new and not any(map(is_unfinished, fact.prompts))]


def check(facts: Iterable[Fact], settings: EvaluateSettings) -> None:
    """Raise ConfigError if evaluate.probes names a kind that the facts' file does not have and that cannot be made."""
    known = [*MADE, COMPLETION, QUESTION, *dict.fromkeys(probe.kind for fact in facts for probe in fact.probes)]
    for name in settings.probes:
        if name not in (*known, AUTO, ALL, NONE):
            hint = did_you_mean(name, known) or f" Known are {', '.join(known)}; or {AUTO}, {ALL}, {NONE}."
            raise ConfigError(f"evaluate.probes = {name}: is no kind of probe, and the facts bring none of it.{hint}")


def questions(
    facts: Sequence[Fact],
    encoder: Encoder,
    settings: EvaluateSettings,
    seed: int,
    statements: Mapping[str, str] | None = None,
) -> list[Asked]:
    """Return the questions of all probes that are asked, which can be judged by the protocols of the settings.

    `statements` are unfinished sentences that the new answer completes, by fact. By default each kind asks about
    ENOUGH facts, drawn by the seed: with all of them probes take several times as long as all other scores.
    """
    is_wanted, maker = wanted(settings), Maker(facts, encoder, seed)
    found: list[Asked] = []
    for fact in facts:
        for make in (*MADE.values(), Maker.brought):
            found += make(maker, fact)
        if statement := (statements or {}).get(fact.id):
            found.append(Asked(fact.id, COMPLETION, statement, fact.new_answers, fact.old_answers))
    needs = {True: "prefer", False: "generate"}  # by whether there are options
    found = [each for each in found if is_wanted(each.probe) and needs[bool(each.options)] in settings.protocols]
    return _drawn(found, seed) if settings.probes == (AUTO,) else found


def _drawn(asked: Sequence[Asked], seed: int) -> list[Asked]:
    """Return the questions of each kind about ENOUGH facts; kinds that ask about the same facts draw the same ones."""
    of_kinds: dict[str, set[str]] = {}
    for each in asked:
        of_kinds.setdefault(each.probe, set()).add(each.fact)
    order = {fact: Random(f"{seed} {fact}").random() for fact in {each.fact for each in asked}}
    drawn = {kind: set(sorted(facts, key=order.__getitem__)[:ENOUGH]) for kind, facts in of_kinds.items()}
    return [each for each in asked if each.fact in drawn[each.probe]]


def statement(fact: Fact, sentence: str) -> str | None:
    """Return the beginning of a sentence up to the new answer at its end; None if it does not end with the answer."""
    text = sentence.rstrip(CLOSING + ".!。")
    begin = text.removesuffix(fact.target_new)
    return begin.rstrip() if begin != text and begin.strip() else None


def _first(answers: Sequence[str]) -> Sequence[str]:
    return answers[:1]


def _as_question(prompt: str) -> str:
    return f"Complete the sentence: {prompt} ..." if is_unfinished(prompt) else prompt
