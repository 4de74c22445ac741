import pytest

from ctsft.errors import CTError
from ctsft.plan.budget import Budget, parse_budget, planning


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        (None, Budget()),
        ("", Budget()),
        ("15 min", Budget(seconds=900)),
        ("1.5h", Budget(seconds=5400)),
        ("20 KB", Budget(bytes=20_000)),
        ("2,000 steps", Budget(steps=2000)),
        ("5000 numbers", Budget(numbers=5000)),
        ("20 kB, 15 min", Budget(bytes=20_000, seconds=900)),
        ("20 KB,2000 steps", Budget(bytes=20_000, steps=2000)),
        ("1,500,000.5 bytes ,1.5 min", Budget(bytes=1_500_000.5, seconds=90)),
        ("90 s and 100 numbers", Budget(seconds=90, numbers=100)),
    ],
)
def test_a_budget_is_read_as_it_is_written(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text",
    [
        "fifteen",
        "15",
        "min",
        "0 steps",
        "15 parsecs",
        "1 MB, 2 MB",
        "-3 min",
        "9" * 5000,
        "1,5 min",
        "2,5 KB",
        "12,34 s",
        "1234,567 s",
    ],
)
def test_what_is_not_understood_is_told(text):
    with pytest.raises(CTError, match="is not understood"):
        parse_budget(text)


def test_steps_are_whole_and_not_beside_a_time():
    with pytest.raises(CTError, match="not both"):
        parse_budget("10 steps, 1 min")
    with pytest.raises(CTError, match="whole number of steps"):
        parse_budget("1.5 steps")


def test_what_fits():
    assert Budget().fits(10**9, 10**9)
    assert Budget(numbers=100).fits(100, 10**9) and not Budget(numbers=100).fits(101, 1)
    assert Budget(bytes=100).fits(10**9, 100) and not Budget(bytes=100).fits(1, 101)


def test_how_long_an_arm_trains():
    assert Budget().length(120, 1.0) == 120
    assert Budget(steps=7).length(120, 1.0) == 7
    assert Budget(seconds=10).length(120, 0.5) == 20
    assert Budget(seconds=10).length(120, 50.0) == 1


def test_a_plan_takes_a_minute_or_three_percent_if_that_is_more():
    assert (planning(10), planning(2000), planning(7200)) == (60, 60, pytest.approx(216))
