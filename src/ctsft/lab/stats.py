"""The tests that a verdict rests on: one-sided t tests over seeds, or over seeds and held-out windows; their
intersection, two looks, Holm's correction."""

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
    error: float = 0.0  # standard error of the mean
    df: float = 0.0  # degrees of freedom of `error`


def t_test(numbers: Sequence[float], bound: float = 0.0) -> Test:
    """One-sample t test of `numbers` (one a seed; differences of pairs make it the paired test) against `bound`.

    Numbers that do not vary decide by their common value: p is 0 or 1, and 1 both ways at the bound. Fewer than SEEDS
    numbers decide nothing. CTError for none.
    """
    n = len(numbers)
    if n == 0:
        raise CTError("there is no number to test; run the experiment with at least one seed.")
    mean = statistics.fmean(numbers)
    return _tested(n, mean, statistics.stdev(numbers) / math.sqrt(n) if n > 1 else 0.0, n - 1, bound)


def crossed_test(table: Sequence[Sequence[float]], bound: float = 0.0) -> Test:
    """`t_test` of a table, (seeds, windows), whose mean shall hold for other seeds and for other windows of text too.

    Both are drawn: number = mean + seed + window + rest, and the variance of the mean is (MS_seeds + MS_windows -
    MS_rest) / (seeds x windows), with Satterthwaite's degrees of freedom (two-way random effects; Searle, Casella and
    McCulloch 1992). The variance is held at or above that of the seeds alone and the degrees of freedom at or below
    theirs, so windows only widen an interval: with three seeds, whose part is often small by chance, Satterthwaite's
    own give p values of 0.0005 several times as often as they should (LOG.md; benchmarks/looks.py has these).
    """
    x = numpy.array(table, dtype=float)
    n, windows = x.shape
    mean = float(x.mean())
    if min(n, windows) < 2:
        return t_test(x.mean(1).tolist(), bound)
    by_seed, by_window = x.mean(1, keepdims=True), x.mean(0, keepdims=True)
    rest = x - by_seed - by_window + mean
    squares = windows * by_seed.var(ddof=1), n * by_window.var(ddof=1), (rest**2).sum() / ((n - 1) * (windows - 1))
    freedom = n - 1, windows - 1, (n - 1) * (windows - 1)
    total, parts = squares[0] + squares[1] - squares[2], list(zip(squares, freedom, strict=True))
    if squares[1] <= squares[2]:  # windows do not differ by more than the rest explains
        total, parts = squares[0], parts[:1]
    below = sum(square**2 / df for square, df in parts)
    return _tested(n, mean, math.sqrt(total / x.size), min(n - 1, float(total**2 / below)) if below else n - 1, bound)


def _tested(n: int, mean: float, error: float, df: float, bound: float) -> Test:
    if n < 2:
        return Test(n, mean, mean, mean, 1.0, 1.0)
    if error <= 1e-12 * max(abs(mean), abs(bound)):  # equal up to rounding
        low, high, above, below = mean, mean, float(mean <= bound), float(mean >= bound)
    else:
        t, width = (mean - bound) / error, float(stdtrit(df, 0.975)) * error
        low, high = mean - width, mean + width
        above, below = float(stdtr(df, -t)), float(stdtr(df, t))  # not 1 - p: it keeps its digits
    return Test(n, mean, low, high, *((above, below) if n >= SEEDS else (1.0, 1.0)), error, df)


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


def bounds(test: Test, level: float) -> tuple[float, float]:
    """The means that a test leaves open: at `level` one rules out what is below the first, and one what is above the
    second (t). Infinite for fewer than SEEDS seeds."""
    if test.n < SEEDS:
        return -math.inf, math.inf
    width = float(stdtrit(test.df, 1 - level)) * test.error
    return test.mean - width, test.mean + width


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
