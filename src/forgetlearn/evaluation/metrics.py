"""Scores of one answer, and means of many: pure functions, each named after its protocol.

docs/scores.md defines them. A fact's score lies between 0 and 1; a summary is in percent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgetlearn.evaluation.statistics import interval
from forgetlearn.storage.records import Mean


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


def mean_with_interval(scores: Sequence[float], *, errored: int = 0, not_asked: int = 0) -> Mean:
    """Mean of scores between 0 and 1, in percent, with the 95 % interval of `statistics.interval` over facts.

    A run and a comparison with one seed therefore give the same interval for the same scores.
    """
    values = np.asarray(scores, dtype=float)
    if len(values) == 0:
        return Mean(mean=None, low=None, high=None, n=0, errored=errored, not_asked=not_asked)
    found = interval(values[None, :])
    counts = {"n": len(values), "errored": errored, "not_asked": not_asked}
    return Mean(mean=found.mean, low=found.low, high=found.high, **counts)
