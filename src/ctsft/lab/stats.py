"""The tests that a verdict rests on: one-sided t tests over seeds, their intersection, and Holm's correction."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy import stats

from ctsft.errors import CTError

SEEDS = 3  # with fewer no test is made: p is 1 both ways
LEVEL = 0.05


@dataclass(frozen=True)
class Test:
    """What n numbers say about their mean and a bound."""

    __test__ = False  # no pytest class

    n: int
    mean: float
    low: float  # two-sided 95% interval of the mean (t); the mean itself if n < 2
    high: float
    above: float  # one-sided p against "the mean is at most the bound"
    below: float  # one-sided p against "the mean is at least the bound"


def t_test(numbers: Sequence[float], bound: float = 0.0) -> Test:
    """One-sample t test of `numbers` (one a seed; differences of pairs make it the paired test) against `bound`.

    Numbers that do not vary decide by their common value: p is 0 or 1, and 1 both ways at the bound. Fewer than SEEDS
    numbers decide nothing. CTError for none.
    """
    n = len(numbers)
    if n == 0:
        raise CTError("there is no number to test; run the experiment with at least one seed.")
    mean = statistics.fmean(numbers)
    if n < 2:
        return Test(n, mean, mean, mean, 1.0, 1.0)
    if statistics.stdev(numbers) <= 1e-12 * math.sqrt(n) * max(abs(mean), abs(bound)):  # equal up to rounding
        low, high, above, below = mean, mean, float(mean <= bound), float(mean >= bound)
    else:
        found = stats.ttest_1samp(numbers, bound, alternative="greater")
        low, high = map(float, stats.ttest_1samp(numbers, bound).confidence_interval(0.95))
        above, below = float(found.pvalue), float(stats.t.cdf(found.statistic, n - 1))  # not 1 - p: it keeps its digits
    return Test(n, mean, low, high, *((above, below) if n >= SEEDS else (1.0, 1.0)))


def all_hold(ps: Sequence[float]) -> float:
    """p of "every one of these is so" (intersection-union test, Berger 1982): the largest p, without a correction."""
    return max(ps)


def one_fails(ps: Sequence[float]) -> float:
    """p of "at least one of these is so": the smallest p times their number (Bonferroni)."""
    return min(1.0, min(ps) * len(ps))


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979), in the given order: reject those at or below the level."""
    adjusted, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, ps[i] * (len(ps) - rank)))
        adjusted[i] = worst
    return adjusted


def correlation_z(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Fisher's z (atanh) of Pearson's correlation, |r| held below 1 - 1e-9; None where x or y does not vary."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return fisher(float(numpy.corrcoef(x, y)[0, 1]))


def fisher(r: float) -> float:
    return math.atanh(max(-1 + 1e-9, min(1 - 1e-9, r)))


def slope(x: Sequence[float], y: Sequence[float], power: bool = False) -> float | None:
    """Least-squares slope of y on x, or of log y on log x (a power law's exponent); None where it has none."""
    if power and min(*x, *y) <= 0:
        return None
    if power:
        x, y = [math.log(v) for v in x], [math.log(v) for v in y]
    return None if len(set(x)) < 2 else statistics.linear_regression(x, y).slope
