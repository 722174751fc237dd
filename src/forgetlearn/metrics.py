"""Scores of one answer, and means of many: pure functions, each named after its protocol.

docs/scores.md defines them. A fact's score lies between 0 and 1; a summary is in percent.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from forgetlearn.statistics import interval

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def token_accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Share of the wanted ids that were predicted at their position. Source: EasyEdit, Ni et al. 2023.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(predicted) != len(wanted) or not wanted:
        raise ValueError(f"{len(predicted)} predictions for {len(wanted)} tokens.")
    return sum(p == w for p, w in zip(predicted, wanted, strict=True)) / len(wanted)


def exact_match(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """1 if every wanted id was predicted, else 0. Source: MEMIT's `acc` on COUNTERFACT."""
    return float(token_accuracy(predicted, wanted) == 1)


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


def preference(logprob: float, other: float) -> float:
    """1 if the first mean log-probability per token is higher, else 0. Source: ROME's ES, PS."""
    return float(logprob > other)


@dataclass(frozen=True)
class Mean:
    """A mean in percent with its 95 % interval over facts, and where the other facts went.

    `n + errored + not_asked` is the number of facts. `mean` is None when n is 0, the interval when n is 1.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    errored: int = 0
    not_asked: int = 0


def mean_with_interval(scores: Sequence[float], *, errored: int = 0, not_asked: int = 0) -> Mean:
    """Mean of scores between 0 and 1, in percent, with the 95 % interval of `statistics.interval` over facts.

    A run and a comparison with one seed therefore give the same interval for the same scores.
    """
    values = np.asarray(scores, dtype=float)
    if len(values) == 0:
        return Mean(None, None, None, 0, errored, not_asked)
    found = interval(values[None, :])
    return Mean(found.mean, found.low, found.high, len(values), errored, not_asked)
