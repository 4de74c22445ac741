import dataclasses
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate
from scipy import stats as scipy_stats

from ctsft.errors import CTError
from ctsft.lab.stats import (
    all_hold,
    bounds,
    corrected,
    correlation_z,
    crossed_test,
    holm,
    one_fails,
    over_looks,
    seeds_needed,
    slope,
    t_test,
)


def numbers(n, mean=0.0, sd=1.0, seed=0):
    generator = random.Random(seed)
    return [generator.gauss(mean, sd) for _ in range(n)]


def t_tail(t, df):
    """P(T > t) by integrating Student's density, written down."""
    scale = math.gamma((df + 1) / 2) / (math.gamma(df / 2) * math.sqrt(df * math.pi))
    return integrate.quad(lambda x: scale * (1 + x * x / df) ** (-(df + 1) / 2), t, math.inf)[0]


@pytest.mark.parametrize("n", [3, 5, 12])
def test_differences_of_pairs_are_scipys_paired_test_and_the_formula(n):
    a, b = numbers(n, seed=1), numbers(n, mean=0.5, seed=2)
    test = t_test([y - x for x, y in zip(a, b, strict=True)], 0.1)
    theirs = scipy_stats.ttest_rel([y - 0.1 for y in b], a, alternative="greater")
    assert test.above == pytest.approx(theirs.pvalue, rel=1e-12)
    assert test.below == pytest.approx(1 - theirs.pvalue, rel=1e-12)
    d = [y - x for x, y in zip(a, b, strict=True)]
    t = (statistics.mean(d) - 0.1) / (statistics.stdev(d) / math.sqrt(n))
    assert test.above == pytest.approx(t_tail(t, n - 1), rel=1e-7)
    interval = scipy_stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (test.low, test.high) == pytest.approx((interval.low, interval.high))


def test_numbers_that_do_not_vary_decide_by_their_value():
    assert (t_test([1.0] * 4, 0.5).above, t_test([1.0] * 4, 0.5).below) == (0, 1)
    assert (t_test([0.1 + 0.2, 0.3, 0.3], 1.0).above, t_test([0.1 + 0.2, 0.3, 0.3], 1.0).below) == (1, 0)
    assert (t_test([2.0] * 3, 2.0).above, t_test([2.0] * 3, 2.0).below) == (1, 1)


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_seeds_decide_nothing(n):
    test = t_test([9.0, 9.1][:n], 0.0)
    assert (test.n, test.above, test.below) == (n, 1, 1)
    assert test.low <= test.mean <= test.high


def test_no_number_is_told():
    with pytest.raises(CTError, match="there is no number to test; run the experiment"):
        t_test([])


def test_the_test_keeps_its_level():
    """Of 2,000 draws with the mean at the bound, five in a hundred are rejected."""
    rejected = sum(t_test(numbers(5, mean=1.0, seed=s), 1.0).above <= 0.05 for s in range(2000))
    assert 70 <= rejected <= 130


def test_all_and_one():
    assert all_hold([0.001, 0.04, 0.02]) == 0.04
    assert one_fails([0.001, 0.04, 0.02]) == pytest.approx(0.003)
    assert one_fails([0.9, 0.8]) == 1


def slow_holm(ps):
    """Step down as it is written: the adjusted p is the smallest level at which this one is rejected."""
    return [min(level for level in sorted({*candidates(ps), 1.0}) if rejects(ps, level, i)) for i in range(len(ps))]


def candidates(ps):
    return [min(1.0, p * m) for p in ps for m in range(1, len(ps) + 1)]


def rejects(ps, level, wanted):
    left = sorted(range(len(ps)), key=lambda i: ps[i])
    while left and ps[left[0]] <= level / len(left) * (1 + 1e-12):
        if left.pop(0) == wanted:
            return True
    return level >= 1


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=6))
def test_holm_is_its_slow_twin(ps):
    assert holm(ps) == pytest.approx(slow_holm(ps))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), min_size=1, max_size=12))
def test_corrected_is_holm_family_by_family(pairs):
    families, ps = zip(*pairs, strict=True)
    found = corrected(families, ps)
    for family in set(families):
        within = [i for i, name in enumerate(families) if name == family]
        assert [found[i] for i in within] == holm([ps[i] for i in within])


def test_two_looks_cost_twice_the_smaller():
    assert over_looks([0.01], 1) == 0.01
    assert over_looks([0.01], 2) == over_looks([0.01, 0.4], 2) == over_looks([0.4, 0.01], 2) == 0.02
    assert over_looks([0.9, 0.8], 2) == 1.0


@pytest.mark.parametrize("level", [0.05, 0.001])
def test_bounds_are_where_the_test_changes_its_mind(level):
    found = numbers(6, mean=2.0, seed=3)
    low, high = bounds(t_test(found), level)
    assert t_test(found, low).above == pytest.approx(level) and t_test(found, high).below == pytest.approx(level)
    assert bounds(t_test(found[:2]), level) == (-math.inf, math.inf)


@pytest.mark.parametrize(("distance", "level"), [(2.0, 0.01), (1.0, 0.05), (0.7, 0.001)])
def test_the_seeds_that_are_needed_find_it_four_times_of_five(distance, level):
    n = seeds_needed(distance, level, 1000)
    for seeds, least, most in ((n, 0.76, 1.0), (n - 2, 0.0, 0.81)):
        hits = sum(t_test(numbers(seeds, mean=distance, seed=s)).above <= level for s in range(800))
        assert least <= hits / 800 <= most, (n, seeds)


def test_what_no_number_of_seeds_settles():
    assert seeds_needed(0.001, 0.05, 1000) is None
    assert seeds_needed(0.0, 0.05, 1000) is None and seeds_needed(-1.0, 0.05, 1000) is None
    assert seeds_needed(1e6, 0.05, 1000) == 3


def table(seeds, windows, sds, seed):
    """Numbers with a part of the seed's, one of the window's and a rest, of standard deviations `sds`."""
    rows, columns = numbers(seeds, sd=sds[0], seed=f"{seed} s"), numbers(windows, sd=sds[1], seed=f"{seed} w")
    rest = iter(numbers(seeds * windows, sd=sds[2], seed=f"{seed} r"))
    return [[a + b + next(rest) for b in columns] for a in rows]


def test_seeds_and_windows_are_crossed_as_the_sums_of_squares_say():
    found, s, w = table(4, 6, (0.5, 1.0, 0.7), 1), 4, 6
    mean = sum(map(sum, found)) / 24
    rows, columns = [sum(row) / w for row in found], [sum(column) / s for column in zip(*found, strict=True)]
    ms_s = w * sum((r - mean) ** 2 for r in rows) / (s - 1)
    ms_w = s * sum((c - mean) ** 2 for c in columns) / (w - 1)
    left = sum((found[i][j] - rows[i] - columns[j] + mean) ** 2 for i in range(s) for j in range(w))
    ms_r = left / ((s - 1) * (w - 1))
    assert ms_w > ms_r
    df = min(3, (ms_s + ms_w - ms_r) ** 2 / (ms_s**2 / 3 + ms_w**2 / 5 + ms_r**2 / 15))
    error = math.sqrt((ms_s + ms_w - ms_r) / 24)
    test = crossed_test(found, 0.1)
    assert (test.n, test.mean, test.error, test.df) == (4, pytest.approx(mean), pytest.approx(error), pytest.approx(df))
    assert test.above == pytest.approx(t_tail((mean - 0.1) / error, df), rel=1e-6)


@pytest.mark.parametrize("sds", [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.2, 1.0, 0.3)])
def test_windows_only_widen_an_interval(sds):
    held = 0
    for seed in range(200):
        found = table(3, 20, sds, seed)
        test, alone = crossed_test(found), t_test([sum(row) / 20 for row in found])
        assert test.low <= alone.low + 1e-12 and test.high >= alone.high - 1e-12
        held += test.df == 2
    assert held >= 20  # what would have been narrower, by Satterthwaite's own degrees of freedom


def test_windows_that_do_not_differ_leave_the_test_over_seeds():
    found = [[x] * 5 for x in numbers(4, mean=0.3, seed=2)]
    one, other = crossed_test(found, 0.1), t_test([row[0] for row in found], 0.1)
    assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other))
    assert crossed_test([[1.0, 2.0], [1.0, 2.0]]).above == 1.0  # two seeds
    assert crossed_test([[1.0], [2.0], [4.0]]) == t_test([1.0, 2.0, 4.0])


@pytest.mark.parametrize("sds", [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.2, 1.0, 0.3)])
def test_other_seeds_and_other_windows_lie_in_the_interval(sds):
    tests = [crossed_test(table(5, 20, sds, seed)) for seed in range(400)]
    assert sum(t.low <= 0 <= t.high for t in tests) / 400 >= 0.92
    if sds[1] == 1:  # where windows differ, seeds alone say too much
        alone = [t_test([sum(row) / 20 for row in table(5, 20, sds, seed)]) for seed in range(400)]
        assert sum(t.low <= 0 <= t.high for t in alone) / 400 < 0.85


def test_correlation_is_fishers_z():
    x, y = numbers(8, seed=3), numbers(8, seed=4)
    assert math.tanh(correlation_z(x, y)) == pytest.approx(scipy_stats.pearsonr(x, y).statistic)
    assert correlation_z([1, 2, 3], [2, 4, 6]) == pytest.approx(math.atanh(1 - 1e-9))
    assert correlation_z([1, 1, 1], [1, 2, 3]) is None
    assert correlation_z([1, 2], [1, 2]) is None


def test_slope():
    assert slope([1, 2, 4], [5, 7, 11]) == pytest.approx(2)
    assert slope([1, 2, 4], [3, 12, 48], power=True) == pytest.approx(2)
    assert slope([1, 2, 4], [3, 0, 48], power=True) is None
    assert slope([2, 2], [1, 3]) is None
