"""Decide whether what a model said matches an answer: normalised text, line by line.

docs/scores.md defines the rules.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, English articles and repeated spaces. Source: SQuAD's evaluation."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def same_text(said: str, answer: str) -> float:
    """1 if the two texts are equal after normalisation, else 0.

    Where normalisation leaves nothing of the answer (it is `"The"`, or all punctuation), the texts
    themselves are compared.
    """
    wanted = normalise(answer)
    return float(normalise(said) == wanted if wanted else said.strip() == answer.strip())


def contains(said: str, answer: str) -> float:
    """1 if the normalised answer occurs, in whole words, in what was said, else 0."""
    wanted = normalise(answer)
    if not wanted:
        return float(answer.strip() in said)
    return float(f" {wanted} " in f" {normalise(said)} ")


def first_lines(text: str, n: int) -> str:
    """Return the first `n` lines of a text, counted from the first that is not blank."""
    return "\n".join(text.lstrip().split("\n")[:n]).rstrip()


def lines_of(answer: str) -> int:
    """Return the number of lines of an answer."""
    return answer.strip().count("\n") + 1


def matches(said: str, answers: Iterable[str], rule: Callable[[str, str], float] = same_text) -> float:
    """Return 1 if the text said matches one of the answers by `rule`, else 0.

    Only as many lines are compared as each answer has: the first one for an answer of one line.
    """
    return max((rule(first_lines(said, lines_of(answer)), answer) for answer in answers), default=0.0)
