"""By hand on tiny matrices, and by simulation: does a 95 % interval hold the truth in 95 % of draws?

The full study (`pytest -m slow tests/test_statistics.py`, or this file as a program, which prints the
table) makes 1,000 draws per setting; the default run takes a few settings with fewer draws.
"""

import itertools
import math
import sys

import numpy as np
from scipy import special, stats

from forgetlearn import statistics

NAN = math.nan
T_2 = 4.302652729911275  # 97.5 % point of a t with 2 degrees of freedom


# --- simulated scores with a known mean


def scores_of(rng, mean, sd, kind, seed_effect, fact_effect):
    """(draws, S, N) scores whose expectation is `mean`: a token is right when a normal variable is above 0.

    Its variance of 1 is that of the seeds (so that their means differ by about `sd`), 60 % of the
    rest for the facts, and the remainder for what is neither. `binary` is one such token per fact, `tokens` the share
    right of 1 to 5, as many in every seed.
    """
    place = special.ndtri(mean)
    of_seeds = (sd / stats.norm.pdf(place)) ** 2
    of_facts, rest = 0.6 * (1 - of_seeds), 0.4 * (1 - of_seeds)
    level = place + math.sqrt(of_seeds) * seed_effect + math.sqrt(of_facts) * fact_effect
    if kind == "binary":
        return (level + math.sqrt(rest) * rng.standard_normal(level.shape) > 0).astype(float)
    tokens = rng.integers(1, 6, (len(level), 1, level.shape[2]))
    right = sum((level + math.sqrt(rest) * rng.standard_normal(level.shape) > 0) * (k < tokens) for k in range(5))
    return right / tokens


def draw_cell(rng, draws, seeds, facts, sd, kind, mean):
    effects = rng.standard_normal((draws, seeds, 1)), rng.standard_normal((draws, 1, facts))
    return scores_of(rng, mean, sd, kind, *effects)


def draw_pair(rng, draws, seeds, facts, sd, kind, means):
    """Two methods whose fact effects correlate by 0.8 and whose seed effects by 0.5."""
    of_seed, of_fact = rng.standard_normal((draws, seeds, 1)), rng.standard_normal((draws, 1, facts))

    def scores(mean):
        seed_effect = math.sqrt(0.5) * of_seed + math.sqrt(0.5) * rng.standard_normal(of_seed.shape)
        fact_effect = math.sqrt(0.8) * of_fact + math.sqrt(0.2) * rng.standard_normal(of_fact.shape)
        return scores_of(rng, mean, sd, kind, seed_effect, fact_effect)

    return scores(means[0]), scores(means[1])


def holds(result, truth):
    return result.low <= 100 * truth <= result.high


def cell_coverage(draws, seeds, facts, sd, kind, mean):
    rng = np.random.default_rng([1, seeds, facts, round(1000 * sd), round(100 * mean)])
    cells = draw_cell(rng, draws, seeds, facts, sd, kind, mean)
    return sum(holds(statistics.interval(cell), mean) for cell in cells) / draws


def pair_coverage(draws, seeds, facts, sd, kind, means=(0.65, 0.6)):
    """Share of intervals that hold the difference, and share of p-values up to 0.05."""
    rng = np.random.default_rng([2, seeds, facts, round(1000 * sd), round(100 * means[0])])
    pairs = zip(*draw_pair(rng, draws, seeds, facts, sd, kind, means), strict=True)
    results = [statistics.paired_difference(a, b, rng=rng, resamples=199) for a, b in pairs]
    held = sum(holds(each, means[0] - means[1]) for each in results) / draws
    return held, sum(each.p_value <= 0.05 for each in results) / draws


CELLS = list(itertools.product((3, 5), (100, 300), (0.0, 0.02, 0.05), ("binary", "tokens"), (0.6, 0.9)))
PAIRS = list(itertools.product((3, 5), (100, 300), (0.0, 0.02, 0.05), ("binary", "tokens")))


def study(draws=1000):
    for setting in CELLS:
        print("cell", *setting, f"{100 * cell_coverage(draws, *setting):.1f}", sep="\t", flush=True)
    for setting in PAIRS:
        held, _ = pair_coverage(draws, *setting)
        _, size = pair_coverage(draws, *setting, means=(0.6, 0.6))
        print("pair", *setting, f"{100 * held:.1f}", f"{100 * size:.1f}", sep="\t", flush=True)


if __name__ == "__main__":
    study(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
