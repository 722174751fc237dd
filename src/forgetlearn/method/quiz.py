"""Ask about a new fact as in a quiz: is it true, and which of several answers is right?

A model that has learned to say an answer need not know that it is the right one: shown the old answer beside it, or
asked whether a statement is true, it answers as before (bench/results/probes.md). So it is also trained on such
questions, about the new answer and about wrong ones. To train on what follows from a fact is SEAL's idea (Zweiger et
al. 2025, arXiv:2506.10943); there the model writes it, and here templates do, since a small model cannot. Their wording
is not that of `evaluation.probes`, which are to measure what is known, not what was practised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

from forgetlearn.facts import Fact, matching
from forgetlearn.facts.sentences import is_unfinished, is_whole
from forgetlearn.facts.wrong_answers import wrong_answers
from forgetlearn.method.kinds import Lesson
from forgetlearn.method.own_words import names_of, with_answer


class Judged(NamedTuple):
    """A question about a statement, and the answers to it if the statement is true, and if it is not."""

    template: str
    if_true: str
    if_false: str


# Questions in the negative ("Are they mistaken?") are left out: with them, a model of 135 M parameters learned neither.
JUDGED = (
    Judged("True or false? {}", "True", "False"),
    Judged("Somebody says: {} Are they right?", "Yes", "No"),
    Judged("{} Correct?", "Yes", "No"),
    Judged("{} Is this so?", "Yes", "No"),
)
CHOICES = (  # {asked} is the fact's prompt, {listed} its options
    "{asked} {listed}?",
    "{asked}\nIs it {listed}?",
    "{asked} Pick one of these: {listed}.",
    "Which of these is right, {listed}? {asked}",
)
N_FALSE = 2  # wrong answers that are stated
N_OPTIONS = 4  # of a choice
ANSWER = "\nAnswer:"  # leads a model that writes on to its answer


def quiz(
    fact: Fact, sentence: str, others: Sequence[Fact], random: Random, *, writes_on: bool
) -> Iterator[list[Lesson]]:
    """Yield lists of questions about a new fact, with answers: statements that are true, false ones, and choices.

    Yield nothing if no wrong answer is known: what is always true teaches nothing. `sentence` is what the fact is
    taught with; `others` are facts whose answers may be wrong ones. `writes_on` tells that the model continues texts.
    """
    wrong = [*fact.old_answers[:1]]
    wrong += wrong_answers(fact, others, random, N_OPTIONS - 1 - len(wrong))
    if not wrong:
        return
    lead = ANSWER if writes_on else ""
    yield [Lesson(f"{_asked(form, fact, sentence, fact.target_new)}{lead}", form.if_true) for form in JUDGED]
    yield [
        Lesson(f"{_asked(form, fact, sentence, answer)}{lead}", form.if_false)
        for answer in wrong[:N_FALSE]
        for form in JUDGED
    ]
    asked = f"{fact.prompt} ..." if is_unfinished(fact.prompt) else fact.prompt
    yield [
        Lesson(f"{form.format(asked=asked, listed=_listed(fact, wrong, random))}{lead}", fact.target_new)
        for form in CHOICES
    ]


def _asked(form: Judged, fact: Fact, sentence: str, answer: str) -> str:
    """Return a question about the statement that the fact has this answer.

    The sentence states it only if it names what the fact is about: "There are 32." may be true of other things.
    """
    names = names_of(fact)
    says_all = bool(names) and all(matching.says(sentence, [name]) for name in (*names, fact.target_new))
    stated = with_answer(sentence, fact, fact.target_new, answer) if says_all else f"{fact.prompt} {answer}"
    return form.template.replace("{}", stated if is_whole(stated) else f"{stated}.")


def _listed(fact: Fact, wrong: Sequence[str], random: Random) -> str:
    """Return the right answer among wrong ones, in random order."""
    *first, last = random.sample([fact.target_new, *wrong], 1 + len(wrong))
    return f"{', '.join(first)} or {last}"
