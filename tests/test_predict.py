import math

import pytest

from ctsft.plan import predict
from ctsft.plan.predict import by_size, growth, predicted


def test_arms_that_would_reach_nothing_keep_their_order():
    drops = [predicted(8.0, drop, math.log(2), 40.0).loss for drop in (3.5, 3.59, 3.61, 3.9, 4.5)]
    assert drops == sorted(drops, reverse=True) and len(set(drops)) == 5 and drops[-1] > 0
    assert drops[0] == pytest.approx(1.0) and abs(drops[1] - 0.82) < 1e-9 and 0.78 < drops[2] < 0.8
    assert drops[3] - drops[4] > 0.01 * 8  # so the better one is not given away for a smaller one


def test_growth_ends_where_no_training_was_seen():
    near, far = growth(12, 12 * predict.FAR, 2, 2, 1000), growth(12, 12_000, 2, 2, 1000)
    assert near == far
    assert predicted(5.0, 1.0, far, 1000.0).high > predicted(5.0, 1.0, near, predict.FAR).high  # and the doubt does not


def test_a_race_as_long_as_the_training_is_the_training():
    assert growth(12, 12, 4, 4, 1000) == 0
    told = predicted(5.0, 1.5, 0.0, 1.0)
    assert told.loss == pytest.approx(3.5)
    assert told.low == pytest.approx(5 - 1.5 * math.exp(predict.ARM))
    assert told.high == pytest.approx(5 - 1.5 / math.exp(predict.ARM))


def test_the_further_ahead_the_wider():
    near, far = predicted(5.0, 1.0, 0.1, 2.0), predicted(5.0, 1.0, 0.1, 100.0)
    assert far.low < near.low < near.loss == far.loss < near.high < far.high < 5


def test_growth_is_a_power_of_the_steps_which_the_numbers_move():
    small, large = (growth(12, 120, 4, 4, n) for n in (1_000, 100_000))
    assert small == pytest.approx(math.log(10) * predict.GROWTH)
    assert large == pytest.approx(math.log(10) * (predict.GROWTH + 2 * predict.BY_SIZE))
    assert growth(12, 48, 4, 4, 1_000) == pytest.approx(2 * growth(12, 24, 4, 4, 1_000))
    assert growth(12, 12, 2, 8, 1_000) == pytest.approx(predict.BY_ROWS * math.log(4))


def test_a_loss_is_never_negative_and_a_race_that_rose_has_next_to_no_drop():
    assert 0 <= predicted(1.0, 0.9, 3.0, 10.0).loss < 1e-9
    rose = predicted(3.0, -0.5, 0.5, 10.0)
    assert rose.loss == pytest.approx(3 - 1e-3 * math.exp(0.5))


def test_no_interval_is_thinner_than_what_counts_as_no_drop():
    told = predicted(4.0, 0.01, 0.1, 3.0)
    assert told.high - told.loss == pytest.approx(0.02) and told.loss - told.low == pytest.approx(0.02)
    assert told.high > 4 - 1e-3  # so it holds a rise, too


def test_an_arm_that_did_not_run_has_the_wider_interval():
    ran, other = predicted(5.0, 1.5, 0.2, 4.0), predicted(5.0, 1.5, 0.2, 4.0, raced=False)
    assert other.low < ran.low and ran.high < other.high and other.loss == ran.loss
    assert by_size(1000, 1000) == 0 < by_size(1000, 2000)
