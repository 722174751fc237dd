"""Find the facts that a question touches, to show them beside the answer."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from forgetlearn.errors import FactError
from forgetlearn.facts.fact import Fact
from forgetlearn.facts.matching import says
from forgetlearn.facts.subjects import subject_span

MOST = 3


def touched(question: str, facts: Iterable[Fact], most: int = MOST) -> list[Fact]:
    """Return the facts that a question touches, the closest first, at most `most`.

    A question touches a fact if it contains one of the fact's prompts, or names the fact's subject, in whole words
    (see `matching.says`). A subject inside a longer one that the question also names does not count: "Spiral Jetty" is
    not about "Spiral". Facts whose prompt the question contains come first, then those whose prompt shares more of its
    words with the question. Of a fact without a subject, only the prompts count.
    """
    line = on_one_line(question)
    asked = [fact for fact in facts if says(line, map(on_one_line, fact.prompts))]
    named = {fact: subject for fact in facts if (subject := _subject(fact)) and says(line, [subject])}
    subjects = set(named.values())
    own = [fact for fact, subject in named.items() if says(line, [subject], subjects)]
    words = set(_words(line))
    others = sorted(set(own) - set(asked), key=lambda fact: (-_shared(fact, words), own.index(fact)))
    return [*asked, *others][:most]


def stands(reply: str, fact: Fact) -> str:
    """Return which of a fact's answers a whole reply says: "new", "old", "both" or "neither".

    Names in the prompt do not count: a reply that names the Spiral Jetty does not say that it is a spiral.
    """
    line, subject = on_one_line(reply), _subject(fact)
    new = says(line, fact.new_answers, (*fact.old_answers, subject), question=fact.prompt)
    old = says(line, fact.old_answers, (*fact.new_answers, subject), question=fact.prompt)
    return "both" if new and old else "new" if new else "old" if old else "neither"


def on_one_line(text: str) -> str:
    """Return a text on one line: `says` looks at as many lines of a reply as the answer has."""
    return " ".join(text.split())


@functools.lru_cache(maxsize=1 << 14)
def _subject(fact: Fact) -> str:
    """Return the subject of a fact as its prompt writes it; "" if it has none."""
    try:
        start, end = subject_span(fact)
    except FactError:
        return fact.subject
    return fact.prompt[start:end]


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _shared(fact: Fact, words: set[str]) -> float:
    """Return the largest share of a prompt's words that are among `words`."""
    return max(len(words.intersection(_words(prompt))) / len(_words(prompt)) for prompt in fact.prompts)
