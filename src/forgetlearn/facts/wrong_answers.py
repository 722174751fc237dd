"""Find answers that are wrong for a fact but might be right: those of facts that ask for the same kind of thing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from random import Random

from forgetlearn.facts import matching
from forgetlearn.facts.fact import Fact

MOST_TRIED = 50  # other facts among which wrong answers are looked for
LONG_WORD = 4  # letters; prompts that share such words may ask for the same kind of thing


def wrong_answers(fact: Fact, others: Sequence[Fact], random: Random, number: int) -> list[str]:
    """Return up to `number` answers of other facts that this fact does not have, neither before nor after its update.

    Those of prompts that share long words with the fact's come first, because they are answers of the same kind.
    """
    taken = [*fact.new_answers, *fact.old_answers]
    tried = random.sample(others, min(MOST_TRIED, len(others)))
    own = _long_words(fact.prompt)
    tried.sort(key=lambda other: -len(own & _long_words(other.prompt)))
    found: list[str] = []
    for text in (text for other in tried for text in (*other.new_answers[:1], *other.old_answers[:1])):
        if len(found) >= number:
            break
        if not any(is_one(text, [each]) or is_one(each, [text]) for each in (*taken, *found)):
            found.append(text)
    return found


def is_one(text: str, answers: Iterable[str]) -> bool:
    """Return True if a text is one of the answers."""
    return any(matching.same_text(text, answer) for answer in answers)


@cache
def _long_words(text: str) -> frozenset[str]:
    return frozenset(word for word in matching.normalise(text).split() if len(word) >= LONG_WORD)
