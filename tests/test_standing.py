"""What follows from the trials of a comparison."""

import math

import pytest

from contests import arm, comparison, trial
from ctsft.plan.standing import curve, reaches, sentences, standings
from ctsft.tune.record import Accuracy


def told(*arms, **changes):
    return sentences(comparison(*arms, **changes))


def test_arms_stand_by_their_mean_loss_with_the_spread_over_seeds():
    rows = standings(comparison(arm("norms", (3.0, 3.2, 3.1)), arm("lora-8", (2.0, 2.3, 2.0), 500, seconds=2.0)))
    assert [row.arm.name for row in rows] == ["lora-8", "norms"]
    best = rows[0]
    assert best.loss == pytest.approx(2.1) and best.spread == pytest.approx(0.173205, rel=1e-4)
    assert (best.trained, best.adapter_bytes, best.memory_bytes, best.seconds) == (500, 2500, 8000, 16.0)
    assert standings(comparison(arm("norms", (3.0,))))[0].spread is None


def test_the_time_to_the_goal_is_read_off_straight_lines():
    points = [(0, 0.0, 4.0), (4, 10.0, 3.0), (8, 20.0, 2.0)]
    for goal, seconds in ((4.5, 0.0), (4.0, 0.0), (3.5, 5.0), (3.0, 10.0), (2.25, 17.5), (2.0, 20.0), (1.9, None)):
        assert reaches(points, goal) == (None if seconds is None else pytest.approx(seconds)), goal
    goal, slow = arm("lora-8", (2.5, 2.5), seconds=2.0), arm("norms", (2.6, 2.6))
    rows = {row.arm.name: row for row in standings(comparison(goal, slow, arm("vera-4", (2.0, 2.2), middle=2.5)))}
    assert rows["lora-8"].to_goal == rows["lora-8"].seconds == 16.0
    assert rows["vera-4"].to_goal == 4.0 and rows["norms"].to_goal is None
    assert standings(comparison(slow))[0].to_goal is None  # nobody to be timed against


def test_a_curve_is_the_mean_over_seeds_up_to_the_first_that_diverged():
    both = arm("norms", (2.0, 3.0))
    assert curve(both) == [(0, 0.0, 4.0), (4, 4.0, 3.0), (8, 8.0, 2.5)]
    one = both.model_copy(update={"trials": [trial("norms", 1, (4.0, 3.0, 2.0)), trial("norms", 2, (4.0, None))]})
    assert curve(one) == [(0, 0.0, 4.0)]
    row = standings(comparison(one))[0]
    assert (row.diverged, row.loss, row.spread, row.to_goal) == (1, math.inf, None, None)


def test_level_is_not_above_on_every_seed():
    best = arm("lora-8", (2.0, 2.2, 2.1), 900)
    rows = standings(comparison(best, arm("diagonal-4", (2.1, 2.15, 2.3), 30), arm("norms", (2.1, 2.3, 2.2), 10)))
    assert [(row.arm.name, row.level) for row in rows] == [("lora-8", True), ("diagonal-4", True), ("norms", False)]
    assert {row.level for row in standings(comparison(arm("lora-8", (2.0,)), arm("norms", (3.0,))))} == {None}


def test_sentences_say_what_is_known_and_no_more():
    best = arm("lora-8", (2.0, 2.2), 900)
    first, second = told(best, arm("diagonal-4", (2.1, 2.15), 30))
    assert first == "lora-8 ends lowest, at 2.100 nats per token (before: 4.000), with 900 numbers."
    assert second.startswith("diagonal-4 is level with it, 0.025 above in the mean but not on each of 2 seeds")
    assert second.endswith("trains 30 times fewer numbers.")
    assert told(best, arm("norms", (2.1, 2.3), 10))[1] == (
        "No arm with fewer numbers is level with it: each ends higher on all 2 seeds."
    )
    assert len(told(best)) == 1 == len(told(best, arm("lora-16", (2.3, 2.3), 1800)))
    assert "One seed has no spread" in told(arm("lora-8", (2.0,)), arm("norms", (3.0,)))[1]
    assert told(best, arm("norms", (4.1, 4.3)))[-1] == "norms is no better than the model as it is, 4.200."
    assert told(arm("norms", (2.0, 2.1), rate=0.3))[-1].startswith(
        "A better rate may lie outside those tried for norms"
    )
    assert len(told(arm("norms", (2.0, 2.1), rate=0.1, tried=[]))) == 1  # by the rule alone there is no edge


def test_answers_of_all_seeds_count_together():
    answers = [Accuracy(correct=c, total=10, low=0, high=1) for c in (3, 5)]
    trials = [trial("norms", i, (4.0, 3.0, 2.0), accuracy=a) for i, a in enumerate(answers, 1)]
    found = standings(comparison(arm("norms", (2.0, 2.0), trials=trials)))[0].accuracy
    assert (found.correct, found.total) == (8, 20) and 0.2 < found.low < 0.4 < found.high < 0.65
    assert standings(comparison(arm("norms", (2.0, 2.0))))[0].accuracy is None
