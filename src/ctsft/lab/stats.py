"""The tests that a verdict rests on: one-sided t tests over seeds, their intersection, two looks, Holm's correction."""

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy.special import nctdtr, stdtr, stdtrit  # Student's distribution: not central, central, its inverse

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
    spread = statistics.stdev(numbers)
    if spread <= 1e-12 * math.sqrt(n) * max(abs(mean), abs(bound)):  # equal up to rounding
        low, high, above, below = mean, mean, float(mean <= bound), float(mean >= bound)
    else:
        error = spread / math.sqrt(n)
        t, width = (mean - bound) / error, float(stdtrit(n - 1, 0.975)) * error
        low, high = mean - width, mean + width
        above, below = float(stdtr(n - 1, -t)), float(stdtr(n - 1, t))  # not 1 - p: it keeps its digits
    return Test(n, mean, low, high, *((above, below) if n >= SEEDS else (1.0, 1.0)))


def all_hold(ps: Sequence[float]) -> float:
    """p of "every one of these is so" (intersection-union test, Berger 1982): the largest p, without a correction."""
    return max(ps)


def one_fails(ps: Sequence[float]) -> float:
    """p of "at least one of these is so": the smallest p times their number (Bonferroni)."""
    return min(1.0, min(ps) * len(ps))


def over_looks(ps: Sequence[float], looks: int) -> float:
    """p of a test that is made at up to `looks` planned sizes, in whatever of them were reached: the smallest p times
    their number (Bonferroni). It only falls when a look is added, so what an earlier look has shown stands."""
    return min(1.0, min(ps) * looks)


def corrected(families: Sequence[str], ps: Sequence[float]) -> list[float]:
    """p values by Holm's correction inside each family, in the given order; `families` names that of every p."""
    adjusted = [1.0] * len(ps)
    for family in dict.fromkeys(families):
        within = [i for i, name in enumerate(families) if name == family]
        for i, p in zip(within, holm([ps[i] for i in within]), strict=True):
            adjusted[i] = p
    return adjusted


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979), in the given order: reject those at or below the level."""
    adjusted, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, ps[i] * (len(ps) - rank)))
        adjusted[i] = worst
    return adjusted


def bounds(numbers: Sequence[float], level: float) -> tuple[float, float]:
    """The means that numbers, one a seed, leave open: one test at `level` rules out what is below the first, and one
    what is above the second (t). Infinite for fewer than SEEDS numbers."""
    if len(numbers) < SEEDS:
        return -math.inf, math.inf
    mean, n = statistics.fmean(numbers), len(numbers)
    width = float(stdtrit(n - 1, 1 - level)) * statistics.stdev(numbers) / math.sqrt(n)
    return mean - width, mean + width


def seeds_needed(distance: float, level: float, most: int, power: float = 0.8) -> int | None:
    """The fewest seeds with which a one-sided t test at `level` finds a mean that is `distance` standard deviations
    beyond its bound, in a share `power` of experiments; None if that takes more than `most`."""
    if not distance > 0:
        return None

    def found(n: int) -> float:
        return 1 - float(nctdtr(n - 1, distance * math.sqrt(n), stdtrit(n - 1, 1 - level)))

    place = bisect.bisect_left(range(SEEDS, most + 1), power, key=found)
    return SEEDS + place if place <= most - SEEDS else None


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
