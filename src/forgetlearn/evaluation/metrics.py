"""Scores of one answer, and means of many: pure functions, each named after its protocol.

docs/scores.md defines them. A fact's score lies between 0 and 1; a summary is in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forgetlearn.evaluation.statistics import interval


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
