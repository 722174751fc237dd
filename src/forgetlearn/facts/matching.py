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
    """Return a text in lower case without punctuation, English articles and repeated spaces, as in SQuAD."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def same_text(reply: str, answer: str) -> float:
    """Return 1 if the two texts are equal after normalisation, else 0.

    If normalisation leaves nothing of the answer (it is `"The"`, or only punctuation), compare the stripped texts.
    """
    wanted = normalise(answer)
    return float(normalise(reply) == wanted if wanted else reply.strip() == answer.strip())


def contains(reply: str, answer: str) -> float:
    """Return 1 if the normalised reply contains the normalised answer as whole words, else 0."""
    wanted = normalise(answer)
    if not wanted:
        return float(answer.strip() in reply)
    return float(f" {wanted} " in f" {normalise(reply)} ")


def first_lines(text: str, n: int) -> str:
    """Return the first `n` lines of a text, starting with the first that is not blank."""
    return "\n".join(text.lstrip().split("\n")[:n]).rstrip()


def lines_of(answer: str) -> int:
    """Return the number of lines of an answer."""
    return answer.strip().count("\n") + 1


def matches(reply: str, answers: Iterable[str], rule: Callable[[str, str], float] = same_text) -> float:
    """Return 1 if the reply matches one of the answers by `rule`, else 0.

    Only as many lines of the reply are compared as the answer has: for an answer of one line, the first.
    """
    return max((rule(first_lines(reply, lines_of(answer)), answer) for answer in answers), default=0.0)
