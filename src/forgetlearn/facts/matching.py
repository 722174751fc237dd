"""Decide whether a model's reply matches an answer: normalised text, line by line.

docs/scores.md defines the rules.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Return a text in lower case without punctuation, English articles and repeated spaces (as SQuAD does)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def same_text(reply: str, answer: str) -> float:
    """Return 1 if the two texts are equal after normalisation, else 0.

    Where normalisation leaves nothing of the answer (it is `"The"`, or all punctuation), the texts
    themselves are compared.
    """
    wanted = normalise(answer)
    return float(normalise(reply) == wanted if wanted else reply.strip() == answer.strip())


def contains(reply: str, answer: str) -> float:
    """Return 1 if the normalised answer occurs, in whole words, in the reply, else 0."""
    wanted = normalise(answer)
    if not wanted:
        return float(answer.strip() in reply)
    return float(f" {wanted} " in f" {normalise(reply)} ")


def first_lines(text: str, n: int) -> str:
    """Return the first `n` lines of a text, counted from the first that is not blank."""
    return "\n".join(text.lstrip().split("\n")[:n]).rstrip()


def lines_of(answer: str) -> int:
    """Return the number of lines of an answer."""
    return answer.strip().count("\n") + 1


def matches(reply: str, answers: Iterable[str], rule: Callable[[str, str], float] = same_text) -> float:
    """Return 1 if the reply matches one of the answers by `rule`, else 0.

    Only as many lines are compared as each answer has: the first one for an answer of one line.
    """
    return max((rule(first_lines(reply, lines_of(answer)), answer) for answer in answers), default=0.0)
