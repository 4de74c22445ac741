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
    correlation_z,
    holm,
    one_fails,
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
