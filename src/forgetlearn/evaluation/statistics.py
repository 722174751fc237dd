"""How sure a comparison is: intervals over seeds and facts, paired differences, trade-off curves. Pure functions.

A cell's scores are a matrix of S seeds x N facts, each score between 0 and 1, NaN where a fact was not
asked or could not be scored. Results are in percent. Facts are crossed with seeds (every seed is asked
the same facts), so a score is taken as

    mean + seed's effect + fact's effect + the rest

and the mean's error has two sources: few seeds (training again moves every fact together) and the facts
that were drawn. The bootstrap gets the first one wrong: from 3 seeds and 300 facts, resampling seeds and
then facts within each holds the truth in 81 to 92 % of draws instead of 95, resampling both as crossed in
90 to 98 %. So the facts' part is a t of N - 1 degrees of freedom, the seeds' part (their variance beyond
what facts and chance explain) a t of S - 1, and the interval is that of the sum of both
(Behrens-Fisher). tests/test_statistics.py measures the coverage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special  # not stats, whose import takes 0.7 s

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
STRATA = 2000
"""Points at which the two chi-squares of an interval are taken: its ends are exact to about 0.1 % of its width."""
RESAMPLES = 9999
BATCH = 500
"""Sign flips held in memory at once."""
ROUNDING = 1e-12
"""Scores that differ by less are equal: sums in another order differ in the last bits."""


@dataclass(frozen=True)
class Estimate:
    """A mean in percent with its 95 % interval, and what it rests on.

    `n_seeds` and `n_facts` have at least one score, `n_scores` is how many there are in all:
    `n_seeds * n_facts` unless some are missing. With `n_seeds` 1 the interval is over facts only and says
    nothing about training again. `low` and `high` are None when there is one fact.
    """

    mean: float
    low: float | None
    high: float | None
    n_seeds: int
    n_facts: int
    n_scores: int


@dataclass(frozen=True)
class Difference(Estimate):
    """Ours minus the baseline in percentage points; the fields are those of an estimate. Positive: ours is higher."""

    p_value: float


@dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds in percent with its 95 % t-interval.

    `low` and `high` are None where nothing shows how seeds vary: there is one, or all of them are equal.
    """

    mean: float
    low: float | None
    high: float | None
    n_seeds: int


@dataclass(frozen=True)
class AtEqualReliability:
    """Ours minus the baseline, in points, averaged over the reliabilities `low` to `high` (percent) that both reach."""

    low: float
    high: float
    locality: OverSeeds
    generality: OverSeeds


@dataclass(frozen=True)
class Curve:
    """What a method scores at each setting (epochs, say), per seed: three matrices of S seeds x P points, in percent.

    Points need no order. A point with a NaN in any of the three is left out.
    """

    reliability: ArrayLike
    locality: ArrayLike
    generality: ArrayLike


def interval(scores: ArrayLike) -> Estimate:
    """Mean of a cell's scores (S, N) in percent, with its 95 % interval over new seeds and new facts.

    With one seed, over new facts only. The interval is made on the logit of the mean, so it stays
    within 0 and 100 and is longer towards the middle. Where all scores are equal, nothing shows how they
    vary: the interval then allows that up to 1 - 0.025^(1/N) of all facts score otherwise
    (Clopper-Pearson; 300 facts at 100 %: 98.8 to 100). Every score weighs the same, missing ones nothing.
    No random numbers: the same scores give the same interval.

    Coverage, lowest and highest in simulations of 4,000 draws (0/1 and token-like scores, 100 and 300 facts, means of
    60 and 90 %), by the standard deviation between seeds in points:

        seeds   0 points     2 points     5 points
        3       95.8-96.7    94.2-96.5    93.1-95.8
        5       95.0-96.7    95.2-96.0    94.3-96.4

    Raises:
        ValueError: the scores are not a matrix, none is finite, or one is outside 0 to 1.
    Source: Searle, Casella, McCulloch, Variance Components, 1992, ch. 4 (the components of a crossed
        design); Owen, "The pigeonhole bootstrap", 2007 (why crossed facts and seeds are not nested).
    """
    values = _matrix(scores, 0.0, 1.0)
    parts = _parts(values)
    low, high = _ends(parts, 0.0, 1.0)
    if low is not None and high is not None and not parts.constant:
        low, high = _on_logit(parts.mean, _half_width(parts))
    return Estimate(100 * parts.mean, _percent(low), _percent(high), *parts.counts)


def paired_difference(
    ours: ArrayLike, baseline: ArrayLike, *, rng: np.random.Generator | int, resamples: int = RESAMPLES
) -> Difference:
    """Ours minus the baseline, both (S, N) over the same seeds and the same facts, with interval and p-value.

    A pair with a NaN on either side is left out. The interval is that of `interval` without the logit.

    The p-value is two-sided, for the hypothesis that the methods do not differ. Under it, the names "ours" and
    "baseline" can be swapped for any fact, in all its seeds together: its scores under several seeds
    depend on each other, so single cells must not be flipped. The signs of the facts' mean differences
    are flipped at random (all 2^N ways where that is at most `resamples`; 10,000 facts take 0.1 s). That alone
    speaks about these very runs: with 3 seeds that differ by 5 points, 31 % of methods that are equal would pass
    for different at 0.05. To speak about new seeds, each flip is given an error of the seeds, a t of S - 1 degrees
    of freedom as in the interval; then it is 7 %, and under 5 % where seeds differ less. With one seed, or seeds
    that vary no more than chance, it is the plain permutation test. Flipping whole seeds would be valid but idle: 3
    seeds have 8 flips, and no p-value under 0.25.

    Coverage, as for `interval`, of two methods that share facts (correlation 0.8) and seeds (0.5):

        seeds   0 points     2 points     5 points
        3       96.1-97.0    94.5-96.5    91.5-94.3
        5       96.0-96.6    95.3-95.6    93.5-95.2

    It is too short where 3 seeds differ more than facts do: 91.5 % at 300 facts of 0/1 scores. Take 5 seeds there.

    Raises:
        ValueError: the shapes differ, no pair is finite, or a score is outside 0 to 1.
    """
    first, second = _matrix(ours, 0.0, 1.0), _matrix(baseline, 0.0, 1.0)
    if first.shape != second.shape:
        raise ValueError(
            f"Ours has {first.shape[0]} seeds x {first.shape[1]} facts, the baseline "
            f"{second.shape[0]} x {second.shape[1]}: a paired difference needs the same seeds and facts, in one order."
        )
    values = _matrix(first - second, -1.0, 1.0)
    parts = _parts(values)
    low, high = _ends(parts, -1.0, 1.0)
    p_value = _p_value(values, parts, resamples, np.random.default_rng(rng))
    return Difference(100 * parts.mean, _percent(low), _percent(high), *parts.counts, p_value=p_value)


def mean_over_seeds(values: ArrayLike, *, differences: bool = False) -> OverSeeds:
    """Mean of one percentage per seed (S,) with its 95 % t-interval over seeds; the facts are taken as they are.

    As in `interval` it is made on the logit of the mean, so it stays within 0 and 100: two or three seeds that vary
    would reach beyond otherwise. Of `differences` it is not, and it ends at -100 and 100. Seeds that are equal
    have no interval: a t-interval of no width would claim certainty. NaN is left out and not counted.

    Raises:
        ValueError: the values are not a vector, or none is finite.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not np.isfinite(given).any():
        raise ValueError(f"A mean over seeds needs a vector with a finite number per seed; got shape {given.shape}.")
    finite = given[np.isfinite(given)]
    mean, n = float(finite.mean()), len(finite)
    if n == 1 or np.ptp(finite) < 100 * ROUNDING:
        return OverSeeds(mean, None, None, n)
    half = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2) * finite.std(ddof=1) / np.sqrt(n))
    if differences:
        return OverSeeds(mean, max(-100.0, mean - half), min(100.0, mean + half), n)
    low, high = _on_logit(mean / 100, half / 100)
    return OverSeeds(mean, 100 * low, 100 * high, n)


def mean_of(values: ArrayLike, weights: ArrayLike) -> tuple[float, float | None, float | None]:
    """Weighted mean of numbers (N,) on any scale, and the ends of its 95 % t-interval; None where there is one number.

    The interval takes the numbers for independent draws and the weights for their sizes.
    """
    given, sizes = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    shares = sizes / sizes.sum()
    mean, n = float(shares @ given), len(given)
    if n == 1:
        return mean, None, None
    error = float(np.sqrt(n / (n - 1) * (shares**2 @ (given - mean) ** 2)))
    half = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    return mean, mean - half, mean + half


def shared_reliability(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Lowest and highest reliability, in percent, that every seed of every curve reaches; None where there is no such.

    Raises:
        ValueError: no curve is given, or one of them cannot be used.
    """
    if not curves:
        raise ValueError("No curve is given.")
    seeds = [knots for curve in curves for knots in _knots(curve)]
    low, high = max(float(knots[0, 0]) for knots in seeds), min(float(knots[0, -1]) for knots in seeds)
    return (low, high) if low <= high else None


def at_equal_reliability(ours: Curve, baseline: Curve) -> AtEqualReliability | None:
    """Difference in locality and generality at equal reliability, with intervals over seeds; None if nothing is shared.

    Within each seed both curves are interpolated linearly between points sorted by reliability, and
    ours minus the baseline is averaged over the range that every seed of both reaches (one range for all seeds, so
    that each measures the same). Seeds are paired by their row. The intervals are over seeds, for these facts.

    Raises:
        ValueError: the two have other numbers of seeds, or a curve cannot be used.
    """
    first, second = _knots(ours), _knots(baseline)
    if len(first) != len(second):
        raise ValueError(f"Ours has {len(first)} seeds, the baseline {len(second)}: give both the same seeds.")
    shared = shared_reliability([ours, baseline])
    if shared is None:
        return None
    differences = [
        [_average(a[0], a[row], *shared) - _average(b[0], b[row], *shared) for row in (1, 2)]
        for a, b in zip(first, second, strict=True)
    ]
    locality, generality = np.asarray(differences).T
    over_seeds = [mean_over_seeds(values, differences=True) for values in (locality, generality)]
    return AtEqualReliability(*shared, *over_seeds)


def area_under_curve(reliability: ArrayLike, locality: ArrayLike, low: float, high: float) -> float | None:
    """Area under one seed's reliability-locality curve from `low` to `high`, as a share of the full one: 0 to 100.

    In other words the mean locality, in percent, over these reliabilities (percent, too); by trapezoids.
    None where the points (P,) do not reach from `low` to `high`: nothing is extrapolated.

    Points are sorted by reliability, and those of equal reliability averaged. A point that
    another one dominates (more epochs, and worse in both) stays in: the upper envelope would keep the
    luckiest points, and favour the method with more of them.

    Raises:
        ValueError: `low` is not below `high`, or the points cannot be used.
    """
    if not 0 <= low < high <= 100:
        raise ValueError(f"The range {low} to {high}: give two reliabilities in percent, the lower first.")
    knots = _sorted_points(np.vstack([_points(reliability), _points(locality)]))
    if knots[0, 0] > low or knots[0, -1] < high:
        return None
    return _average(knots[0], knots[1], low, high)


def pareto_front(points: ArrayLike) -> list[int]:
    """Indices of the points (P, coordinates) that no other one dominates, in order; higher is better in each.

    One point dominates another if it is nowhere lower and somewhere higher, so equal points stay
    together. A point with a NaN is never on the front, and dominates nothing.

    Raises:
        ValueError: the points are not a matrix.
    """
    given = np.asarray(points, dtype=np.float64)
    if given.ndim != 2:
        raise ValueError(f"Points have the shape (points, coordinates), not {given.shape}.")

    def dominated(point: Floats) -> bool:
        return bool(((given >= point).all(axis=1) & (given > point).any(axis=1)).any())

    return [index for index, point in enumerate(given) if not np.isnan(point).any() and not dominated(point)]


# --- the variance of a mean over seeds and facts


@dataclass(frozen=True)
class _Parts:
    """A mean, as a share, and the variance of its error: from facts (at given seeds), and from seeds beyond that."""

    mean: float
    of_facts: float
    of_seeds: float
    constant: bool
    counts: tuple[int, int, int]  # seeds, facts, scores


def _matrix(scores: ArrayLike, lowest: float, highest: float) -> Floats:
    """The scores as a matrix of floats, checked."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"Scores have the shape (seeds, facts), not {values.shape}.")
    if np.isnan(values).all():
        seeds, facts = values.shape
        raise ValueError(f"None of the {seeds} x {facts} scores is a number. Leave out what no fact was asked.")
    outside = ~np.isnan(values) & ~((values >= lowest) & (values <= highest))
    if outside.any():
        seed, fact = np.argwhere(outside)[0]
        raise ValueError(
            f"Score {values[seed, fact]} (seed {seed}, fact {fact}; {outside.sum()} such): "
            f"must be between {lowest:g} and {highest:g}. Scores are shares, not percent."
        )
    return values


def _parts(values: Floats) -> _Parts:
    """Mean and components of a matrix with missing entries: mean squares of the two-way layout, by totals.

    With all scores there: var(means of facts) / N, and max(0, var(means of seeds) / S - residual / (S N)).
    """
    there = ~np.isnan(values)
    values, there = values[there.any(axis=1)], there[there.any(axis=1)]
    values, there = values[:, there.any(axis=0)], there[:, there.any(axis=0)]
    seeds, facts = values.shape
    total = int(there.sum())
    mean = float(values[there].mean())
    error = np.where(there, values - mean, 0.0)
    constant = bool(np.ptp(values[there]) < ROUNDING)
    of_facts = facts / (facts - 1) * float((error.sum(axis=0) ** 2).sum()) / total**2 if facts > 1 else 0.0
    of_seeds = 0.0
    if seeds > 1:
        rest = np.where(there, error - error.sum(axis=0) / there.sum(axis=0), 0.0)
        rest = np.where(there, rest - (rest.sum(axis=1) / there.sum(axis=1))[:, None], 0.0)
        free = total - seeds - facts + 1
        residual = float((rest**2).sum()) / free / total if free > 0 else 0.0
        of_facts = max(of_facts, residual)  # its expectation is never less: matters for a handful of facts
        of_seeds = seeds / (seeds - 1) * float((error.sum(axis=1) ** 2).sum()) / total**2 - residual
        of_seeds = of_seeds if of_seeds > ROUNDING**2 else 0.0
    return _Parts(mean, of_facts, of_seeds, constant, (seeds, facts, total))


@lru_cache(maxsize=64)
def _chi_squares(seeds: int, facts: int) -> tuple[Floats, Floats]:
    """Pairs of a chi-square for seeds and one for facts, each over its degrees of freedom, evenly spread."""
    levels = (np.arange(STRATA) + 0.5) / STRATA
    of_facts = 2 * special.gammaincinv((facts - 1) / 2, levels) / (facts - 1)
    of_seeds = 2 * special.gammaincinv((seeds - 1) / 2, levels) / (seeds - 1)
    return of_seeds, np.random.default_rng(0).permutation(of_facts)


def _half_width(parts: _Parts) -> float:
    """Half the 95 % interval of a sum of two t: `sqrt(of_seeds)` times a t(S - 1), `sqrt(of_facts)` times a t(N - 1).

    A t is a normal over the root of a chi-square: given the two chi-squares, the sum is normal.
    """
    seeds, facts, _ = parts.counts
    if parts.of_seeds == 0:
        return float(special.stdtrit(facts - 1, (1 + CONFIDENCE) / 2) * np.sqrt(parts.of_facts))
    for_seeds, for_facts = _chi_squares(seeds, facts)
    spread = np.sqrt(parts.of_seeds / for_seeds + parts.of_facts / for_facts)

    def beyond(half: float) -> float:
        return float(2 * special.ndtr(half / spread).mean() - 1) - CONFIDENCE

    quantile = special.ndtri((1 + CONFIDENCE) / 2)
    return float(optimize.brentq(beyond, quantile * spread.min(), quantile * spread.max(), rtol=1e-10))


def _ends(parts: _Parts, lowest: float, highest: float) -> tuple[float | None, float | None]:
    """Both ends of the interval around the mean, within the range that scores can have; None for one fact."""
    _, facts, _ = parts.counts
    if facts == 1:
        return None, None
    if parts.constant:
        otherwise = 1 - ((1 - CONFIDENCE) / 2) ** (1 / facts)
        return parts.mean - otherwise * (parts.mean - lowest), parts.mean + otherwise * (highest - parts.mean)
    half = _half_width(parts)
    return max(lowest, parts.mean - half), min(highest, parts.mean + half)


def _on_logit(mean: float, half: float) -> tuple[float, float]:
    """Both ends of the interval of a share between 0 and 1, given half its width on the share's own scale."""
    centre, half = special.logit(mean), half / (mean * (1 - mean))
    return float(special.expit(centre - half)), float(special.expit(centre + half))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _p_value(values: Floats, parts: _Parts, resamples: int, rng: np.random.Generator) -> float:
    """Two-sided p-value of the mean of differences: flips per fact, each with an error of the seeds added."""
    seeds, _, total = parts.counts
    of_fact = np.nansum(values, axis=0) / total  # each fact's share of the mean; 0 where it has no score
    of_fact = of_fact[np.abs(of_fact) > ROUNDING / total]
    if len(of_fact) == 0:
        return 1.0
    exact = 2 ** len(of_fact) <= resamples
    flips = _all_flips(of_fact) if exact else _random_flips(of_fact, resamples, rng)
    if parts.of_seeds > 0:
        flips = np.resize(flips, resamples) + np.sqrt(parts.of_seeds) * rng.standard_t(seeds - 1, resamples)
        exact = False
    least = abs(parts.mean) - ROUNDING
    as_far = int((np.abs(flips) >= least).sum())
    return as_far / len(flips) if exact else (as_far + 1) / (len(flips) + 1)


def _all_flips(values: Floats) -> Floats:
    """The sum of the values (N,) under each of the 2^N ways to sign them."""
    plus = (np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1
    return np.asarray((2 * plus - 1) @ values)


def _random_flips(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """The sum of the values (N,) under `resamples` random ways to sign them; each sign is one random bit.

    In float64, since sums that are equal but for rounding are counted as equal.
    """
    sums = []
    for start in range(0, resamples, BATCH):
        drawn = rng.integers(0, 256, (min(BATCH, resamples - start), -(-len(values) // 8)), dtype=np.uint8)
        sums.append(np.unpackbits(drawn, axis=1, count=len(values)) @ values)
    return np.asarray(2 * np.concatenate(sums) - values.sum(), dtype=np.float64)


# --- curves


def _points(values: ArrayLike) -> Floats:
    """One seed's values (P,) in percent, checked."""
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1:
        raise ValueError(f"A seed's points are a vector, not of shape {given.shape}.")
    if np.isinf(given).any() or (given < 0).any() or (given > 100).any():
        raise ValueError(f"A curve's points are in percent, 0 to 100; got {given.tolist()}.")
    return given


def _sorted_points(points: Floats) -> Floats:
    """Points (rows: reliability, then the others; P columns) by reliability: none twice, those of one averaged."""
    points = points[:, ~np.isnan(points).any(axis=0)]
    if points.shape[1] == 0:
        raise ValueError("A seed's curve has no point: every one has a NaN.")
    reliability, place, count = np.unique(points[0], return_inverse=True, return_counts=True)
    others = [np.bincount(place, weights=row) / count for row in points[1:]]
    return np.vstack([reliability, *others])


def _knots(curve: Curve) -> list[Floats]:
    """Per seed the rows reliability (rising), locality, generality."""
    rows = [np.asarray(each, dtype=np.float64) for each in (curve.reliability, curve.locality, curve.generality)]
    shapes = {row.shape for row in rows}
    if len(shapes) > 1 or rows[0].ndim != 2 or rows[0].size == 0:
        raise ValueError(f"A curve's three matrices have one shape (seeds, points); got {[r.shape for r in rows]}.")
    return [_sorted_points(np.vstack([_points(row[seed]) for row in rows])) for seed in range(len(rows[0]))]


def _average(x: Floats, y: Floats, low: float, high: float) -> float:
    """Mean over x from `low` to `high` of the straight lines through the points; the value there where the two meet."""
    if low == high:
        return float(np.interp(low, x, y))
    at = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    return float(np.trapezoid(np.interp(at, x, y), at) / (high - low))
