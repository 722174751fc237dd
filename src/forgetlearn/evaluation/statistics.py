"""Compute intervals over seeds and facts, paired differences and trade-off curves. Results are in percent.

A cell's scores are a matrix of S seeds x N facts, each score between 0 and 1, NaN where a fact was not asked or could
not be scored. Facts are crossed with seeds (every seed is asked the same facts), so a score is

    mean + effect of its seed + effect of its fact + residual

The mean's error has two sources: there are few seeds (training again moves all facts together), and the facts are a
sample. The bootstrap gets the first wrong: with 3 seeds and 300 facts, resampling seeds and then facts within each
covers the true mean in 81 to 92 % of draws instead of 95 %, and resampling both as crossed in 90 to 98 %. Here, the
error from facts is a t with N - 1 degrees of freedom, the error from seeds (their variance beyond what facts and
chance explain) is a t with S - 1, and the interval is that of their sum (Behrens-Fisher). tests/test_statistics.py
measures a coverage of 93 to 97 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special  # not stats, whose import takes 0.7 s

from forgetlearn.storage.records import Mean

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
STRATA = 2000  # values of each chi-square, with which the ends of an interval are exact to about 0.1 % of its width
RESAMPLES = 9999
BATCH = 500  # sign flips held in memory at once
ROUNDING = 1e-12  # scores that differ by less count as equal, because sums in another order differ in the last bits


@dataclass(frozen=True)
class Estimate:
    """A mean in percent with its 95 % interval, which is None if there is only one fact.

    `n_seeds` and `n_facts` count those with at least one score; `n_scores` is the number of scores.
    """

    mean: float
    low: float | None
    high: float | None
    n_seeds: int
    n_facts: int
    n_scores: int


@dataclass(frozen=True)
class Difference(Estimate):
    """Ours minus the baseline, in percentage points; positive if ours is higher."""

    p_value: float


@dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds in percent with its 95 % t-interval, which is None for one seed or if all seeds are equal."""

    mean: float
    low: float | None
    high: float | None
    n_seeds: int


@dataclass(frozen=True)
class AtEqualReliability:
    """Ours minus the baseline, in points, averaged over the reliabilities (`low` to `high` percent) that both reach."""

    low: float
    high: float
    locality: OverSeeds
    generality: OverSeeds


@dataclass(frozen=True)
class Curve:
    """A method's scores at each setting (of epochs, say), per seed: three matrices of S seeds x P points, in percent.

    Points may come in any order. A point with a NaN in any of the three is left out.
    """

    reliability: ArrayLike
    locality: ArrayLike
    generality: ArrayLike


def interval(scores: ArrayLike) -> Estimate:
    """Return the mean of scores (S, N) in percent, with its 95 % interval over new seeds and new facts.

    With one seed, the interval is over new facts only. It is computed on the logit of the mean, so it stays within 0
    and 100 and is longer towards the middle. If all scores are equal, nothing shows how they vary; the interval then
    allows that up to 1 - 0.025^(1/N) of all facts score otherwise (Clopper-Pearson; 300 facts at 100 %: 98.8 to 100).
    All scores have equal weight, and missing ones are ignored. No random numbers are used: the same scores give the
    same interval.

    Raises:
        ValueError: the scores are not a matrix, none is finite, or one is outside 0 to 1.
    Source: Searle, Casella, McCulloch, Variance Components, 1992, ch. 4 (the components of a crossed
        design); Owen, "The pigeonhole bootstrap", 2007 (why crossed facts and seeds are not nested).
    """
    parts = _parts(_matrix(scores, 0.0, 1.0))
    low, high = _ends(parts, 0.0, 1.0, on_logit=True)
    return Estimate(100 * parts.mean, _percent(low), _percent(high), *parts.counts)


def mean_with_interval(scores: Sequence[float], *, errored: int = 0, not_asked: int = 0) -> Mean:
    """Return the mean of one run's scores (0 to 1) in percent, with its `interval` over facts."""
    if not scores:
        return Mean(mean=None, low=None, high=None, n=0, errored=errored, not_asked=not_asked)
    found = interval([scores])
    counts = {"n": len(scores), "errored": errored, "not_asked": not_asked}
    return Mean(mean=found.mean, low=found.low, high=found.high, **counts)


def paired_difference(
    ours: ArrayLike, baseline: ArrayLike, *, rng: np.random.Generator | int, resamples: int = RESAMPLES
) -> Difference:
    """Return ours minus the baseline, both (S, N) over the same seeds and facts, with interval and p-value.

    A pair with a NaN on either side is left out. The interval is computed as in `interval`, but without the logit.

    The p-value is two-sided, for the hypothesis that the methods do not differ. Under this hypothesis, the names
    "ours" and "baseline" can be swapped for any fact, but only in all its seeds together, because its scores under
    several seeds depend on each other. So the test flips the signs of the facts' mean differences at random (in all
    2^N ways if that is at most `resamples`).

    These flips alone would test only these very runs: with 3 seeds that differ by 5 points, 31 % of equal methods
    would be called different at 0.05. To test new seeds, a random error of the seeds is added to each flip, a t with
    S - 1 degrees of freedom as in the interval. Then 7 % are called different, and under 5 % if seeds differ less.
    With one seed, or with seeds that vary no more than chance, this is the plain permutation test. Flipping whole
    seeds would be valid but useless: 3 seeds have 8 flips, and no p-value under 0.25.

    Raises:
        ValueError: the shapes differ; see `interval`.
    """
    first, second = _matrix(ours, 0.0, 1.0), _matrix(baseline, 0.0, 1.0)
    if first.shape != second.shape:
        raise ValueError(f"Ours has {first.shape} seeds and facts, the baseline {second.shape}: they must be the same.")
    values = _matrix(first - second, -1.0, 1.0)
    parts = _parts(values)
    low, high = _ends(parts, -1.0, 1.0)
    p_value = _p_value(values, parts, resamples, np.random.default_rng(rng))
    return Difference(100 * parts.mean, _percent(low), _percent(high), *parts.counts, p_value=p_value)


def mean_over_seeds(values: ArrayLike, *, differences: bool = False) -> OverSeeds:
    """Return the mean of one percentage per seed (S,) with its 95 % t-interval over seeds, for these facts.

    The interval is computed on the logit of the mean, as in `interval`, so it stays within 0 and 100; with two or
    three seeds that vary, it would otherwise reach further. For `differences` the logit is not used, and the interval
    is cut at -100 and 100. Equal seeds have no interval, because one of no width would claim certainty.
    """
    given = np.asarray(values, dtype=np.float64)
    mean, n = float(given.mean()), len(given)
    if n == 1 or np.ptp(given) < 100 * ROUNDING:
        return OverSeeds(mean, None, None, n)
    half = float(_t_quantile(n) * given.std(ddof=1) / np.sqrt(n))
    if differences:
        return OverSeeds(mean, max(-100.0, mean - half), min(100.0, mean + half), n)
    low, high = _on_logit(mean / 100, half / 100)
    return OverSeeds(mean, 100 * low, 100 * high, n)


def mean_of(values: ArrayLike, weights: ArrayLike) -> tuple[float, float | None, float | None]:
    """Return the weighted mean of numbers (N,) and the ends of its 95 % t-interval (None for one number).

    The numbers may be on any scale. They are treated as independent draws, and the weights as their sizes.
    """
    given, sizes = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    shares = sizes / sizes.sum()
    mean, n = float(shares @ given), len(given)
    if n == 1:
        return mean, None, None
    half = _t_quantile(n) * float(np.sqrt(n / (n - 1) * (shares**2 @ (given - mean) ** 2)))
    return mean, mean - half, mean + half


def at_equal_reliability(ours: Curve, baseline: Curve) -> AtEqualReliability | None:
    """Return the differences in locality and generality at equal reliability; None if no reliability is shared.

    Within each seed, both curves are interpolated linearly between points sorted by reliability. Ours minus the
    baseline is then averaged over the range of reliability that every seed of both reaches; all seeds share this
    range, so that each measures the same. Seeds are paired by their row. The intervals are over seeds, for these
    facts.
    """
    first, second = _knots(ours), _knots(baseline)
    low, high = (max(float(knots[0, 0]) for knots in first + second), min(float(k[0, -1]) for k in first + second))
    if low > high:
        return None
    locality, generality = (
        [
            _average(a[0], a[row], low, high) - _average(b[0], b[row], low, high)
            for a, b in zip(first, second, strict=True)
        ]
        for row in (1, 2)
    )
    over_seeds = [mean_over_seeds(values, differences=True) for values in (locality, generality)]
    return AtEqualReliability(low, high, *over_seeds)


def mean_locality(curve: Curve, low: float, high: float) -> OverSeeds:
    """Return the mean locality over the reliabilities from `low` to `high`, both of which every seed reaches.

    It is the area under the reliability-locality curve, by trapezoids, as a share of the full area. A dominated point
    (more epochs, and worse in both) stays in: the upper envelope would keep only the luckiest points, and favour the
    method with more of them.
    """
    return mean_over_seeds([_average(knots[0], knots[1], low, high) for knots in _knots(curve)])


def pareto_front(points: ArrayLike) -> list[int]:
    """Return the indices of the points (P, coordinates) that no other point dominates; higher is better in each.

    A point dominates another if it is nowhere lower and somewhere higher, so equal points stay together. A point with
    a NaN is never on the front, and dominates nothing.
    """
    given = np.asarray(points, dtype=np.float64)

    def dominated(point: Floats) -> bool:
        return bool(((given >= point).all(axis=1) & (given > point).any(axis=1)).any())

    return [index for index, point in enumerate(given) if not np.isnan(point).any() and not dominated(point)]


# --- the variance of a mean over seeds and facts


@dataclass(frozen=True)
class _Parts:
    """A mean (as a share), and the variance of its error due to facts (at given seeds) and, beyond that, to seeds."""

    mean: float
    of_facts: float
    of_seeds: float
    constant: bool
    counts: tuple[int, int, int]  # seeds, facts, scores


def _matrix(scores: ArrayLike, lowest: float, highest: float) -> Floats:
    """Return the scores as floats; raise ValueError unless they are a matrix with a number in it, and in the range."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or np.isnan(values).all():
        raise ValueError(f"Scores must be a matrix (seeds, facts) with at least one number, not {scores!r:.200}.")
    if (outside := values[~np.isnan(values) & ~((values >= lowest) & (values <= highest))]).size:
        raise ValueError(
            f"Scores must lie between {lowest:g} and {highest:g}, not in percent: {outside.size} do not, for example "
            f"{outside[0]}."
        )
    return values


def _parts(values: Floats) -> _Parts:
    """Return the mean and variance components of a matrix that may have gaps, from two-way mean squares.

    If no score is missing, they are var(means of facts) / N and max(0, var(means of seeds) / S - residual / (S N)).
    """
    known = ~np.isnan(values)
    values, known = values[known.any(axis=1)], known[known.any(axis=1)]
    values, known = values[:, known.any(axis=0)], known[:, known.any(axis=0)]
    seeds, facts = values.shape
    total = int(known.sum())
    mean = float(values[known].mean())
    error = np.where(known, values - mean, 0.0)
    constant = bool(np.ptp(values[known]) < ROUNDING)
    of_facts = facts / (facts - 1) * float((error.sum(axis=0) ** 2).sum()) / total**2 if facts > 1 else 0.0
    of_seeds = 0.0
    if seeds > 1:
        rest = np.where(known, error - error.sum(axis=0) / known.sum(axis=0), 0.0)
        rest = np.where(known, rest - (rest.sum(axis=1) / known.sum(axis=1))[:, None], 0.0)
        free = total - seeds - facts + 1
        residual = float((rest**2).sum()) / free / total if free > 0 else 0.0
        of_facts = max(of_facts, residual)  # its expectation is never less; this matters for a handful of facts
        of_seeds = seeds / (seeds - 1) * float((error.sum(axis=1) ** 2).sum()) / total**2 - residual
        of_seeds = of_seeds if of_seeds > ROUNDING**2 else 0.0
    return _Parts(mean, of_facts, of_seeds, constant, (seeds, facts, total))


def _t_quantile(n: int) -> float:
    """Return half the width of a 95 % t-interval from n draws, in standard errors."""
    return float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))


@lru_cache(maxsize=64)
def _chi_squares(seeds: int, facts: int) -> tuple[Floats, Floats]:
    """Return evenly spread pairs of chi-squares, one for seeds and one for facts, each over its degrees of freedom."""
    levels = (np.arange(STRATA) + 0.5) / STRATA
    of_facts = 2 * special.gammaincinv((facts - 1) / 2, levels) / (facts - 1)
    of_seeds = 2 * special.gammaincinv((seeds - 1) / 2, levels) / (seeds - 1)
    return of_seeds, np.random.default_rng(0).permutation(of_facts)


def _half_width(parts: _Parts) -> float:
    """Return half the width of the 95 % interval of `sqrt(of_seeds)` t(S - 1) + `sqrt(of_facts)` t(N - 1).

    A t is a normal variable over the root of a chi-square, so for given chi-squares the sum is normal.
    """
    seeds, facts, _ = parts.counts
    if parts.of_seeds == 0:
        return float(_t_quantile(facts) * np.sqrt(parts.of_facts))
    for_seeds, for_facts = _chi_squares(seeds, facts)
    spread = np.sqrt(parts.of_seeds / for_seeds + parts.of_facts / for_facts)

    def beyond(half: float) -> float:
        return float(2 * special.ndtr(half / spread).mean() - 1) - CONFIDENCE

    quantile = special.ndtri((1 + CONFIDENCE) / 2)
    return float(optimize.brentq(beyond, quantile * spread.min(), quantile * spread.max(), rtol=1e-10))


def _ends(parts: _Parts, lowest: float, highest: float, *, on_logit: bool = False) -> tuple[float | None, float | None]:
    """Return both ends of the interval around the mean, within the range of scores; None and None for one fact."""
    _, facts, _ = parts.counts
    if facts == 1:
        return None, None
    if parts.constant:
        otherwise = 1 - ((1 - CONFIDENCE) / 2) ** (1 / facts)
        return parts.mean - otherwise * (parts.mean - lowest), parts.mean + otherwise * (highest - parts.mean)
    half = _half_width(parts)
    if on_logit:
        return _on_logit(parts.mean, half)
    return max(lowest, parts.mean - half), min(highest, parts.mean + half)


def _on_logit(mean: float, half: float) -> tuple[float, float]:
    """Return both ends of a share's interval, computed on the logit; `half` is half its width before that."""
    centre, half = special.logit(mean), half / (mean * (1 - mean))
    return float(special.expit(centre - half)), float(special.expit(centre + half))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _p_value(values: Floats, parts: _Parts, resamples: int, rng: np.random.Generator) -> float:
    """Return the two-sided p-value of a mean difference, from flips of facts, each with a random error of the seeds."""
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
    """Return the sum of the values (N,) under each of the 2^N ways to sign them."""
    plus = (np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1
    return np.asarray((2 * plus - 1) @ values)


def _random_flips(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return the sum of the values (N,) under `resamples` random ways to sign them; each sign is one random bit."""
    sums = []
    for start in range(0, resamples, BATCH):
        drawn = rng.integers(0, 256, (min(BATCH, resamples - start), -(-len(values) // 8)), dtype=np.uint8)
        sums.append(np.unpackbits(drawn, axis=1, count=len(values)) @ values)
    return np.asarray(2 * np.concatenate(sums) - values.sum(), dtype=np.float64)


# --- curves


def _knots(curve: Curve) -> list[Floats]:
    """Return, per seed, the rows reliability (rising), locality, generality; equal reliabilities are averaged."""
    rows = [np.asarray(each, dtype=np.float64) for each in (curve.reliability, curve.locality, curve.generality)]
    found = []
    for points in np.stack(rows, axis=1):
        points = points[:, ~np.isnan(points).any(axis=0)]
        if points.shape[1] == 0:
            raise ValueError("A seed's curve has no usable point: each contains a NaN.")
        reliability, place, count = np.unique(points[0], return_inverse=True, return_counts=True)
        others = [np.bincount(place, weights=row) / count for row in points[1:]]
        found.append(np.vstack([reliability, *others]))
    return found


def _average(x: Floats, y: Floats, low: float, high: float) -> float:
    """Return the mean height, from x = `low` to `high`, of the line through the points; y(low) if low equals high."""
    if low == high:
        return float(np.interp(low, x, y))
    at = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    return float(np.trapezoid(np.interp(at, x, y), at) / (high - low))
