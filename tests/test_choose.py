import pytest

from ctsft.plan.budget import Budget
from ctsft.plan.choose import FEW, Option, decide

START = 5.0


def option(name, loss, trained, ours=True, fits=True, high=None):
    return Option(
        candidate=name, ours=ours, raced=True, rate=0.1, again=False, race=loss, steps=100, loss=loss, low=loss - 0.3,
        high=loss + 0.3 if high is None else high, trained=trained, adapter_bytes=4 * trained,
        memory_bytes=16 * trained, seconds=9.0, fits=fits,
    )  # fmt: skip


def decided(*options, rows=100, heldout=50):
    return decide(START, options, Budget(), rows, heldout)


def curve(*losses):
    """Arms of K = 4, 16, 64, ... with these losses."""
    return [option(f"diagonal-{4 ** (i + 1)}", loss, 40 * 4**i) for i, loss in enumerate(losses)]


def test_the_best_arm_where_the_curve_is_not_flat():
    found = decided(*curve(4.0, 3.5, 3.0))
    assert (found.verdict, found.candidate, found.as_good) == ("recommended", "diagonal-64", ["diagonal-64"])
    assert "No smaller arm" in found.why[1] and "diagonal-16" in found.why[2] and "25% of the drop" in found.why[2]


def test_the_smallest_within_a_percent_where_it_is_flat():
    found = decided(*curve(4.0, 3.019, 3.0))
    assert (found.candidate, found.as_good) == ("diagonal-16", ["diagonal-16", "diagonal-64"])
    assert "flat" in found.why[1] and "diagonal-64 is predicted lowest" in found.why[1]
    assert decided(*curve(4.0, 3.021, 3.0)).candidate == "diagonal-64"


def test_an_arm_over_the_budget_is_not_recommended():
    small, large = option("diagonal-4", 4.0, 40), option("diagonal-64", 3.0, 640, fits=False)
    assert decided(small, large).candidate == "diagonal-4"
    found = decided(option("diagonal-4", 4.0, 40, fits=False), large)
    assert (found.verdict, found.candidate) == ("nothing fits", None)
    assert "diagonal-4" in found.why[0] and "160 bytes" in found.why[0]


def test_a_peer_is_named_where_it_is_clearly_better_and_fits():
    found = decided(*curve(4.0, 3.5), option("lora-8", 2.0, 90_000, ours=False))
    assert (found.candidate, found.better_peer) == ("diagonal-16", "lora-8")
    assert found.why[-1].startswith("Use lora-8 instead if its 360,000 bytes")
    near = decided(*curve(4.0, 3.5), option("lora-8", 3.45, 90_000, ours=False))
    assert near.better_peer is None and "No other method" in near.why[-1]
    over = decided(*curve(4.0, 3.5), option("lora-8", 2.0, 90_000, ours=False, fits=False))
    assert over.better_peer is None and over.why[-1] == "lora-8 does not fit the budget."


@pytest.mark.parametrize("few", [{"rows": FEW - 1}, {"heldout": FEW - 1}])
def test_few_rows_tell_nothing(few):
    found = decided(*curve(4.0, 3.5, 3.0, 2.5), **few)
    assert (found.verdict, found.candidate, found.as_good) == ("cannot tell", "diagonal-64", [])
    assert "chance decides" in found.why[0]


def test_intervals_that_overlap_wholly_tell_nothing():
    found = decided(*curve(3.02, 3.01, 3.0))
    assert found.verdict == "cannot tell" and found.candidate == "diagonal-64" and "overlap wholly" in found.why[0]


def test_races_that_may_not_have_helped_tell_nothing():
    found = decided(option("diagonal-16", 4.9, 100, high=5.1), option("diagonal-64", 4.95, 400))
    assert found.verdict == "cannot tell" and "do not show that training helps" in found.why[0]
    found = decided(*curve(4.998, 4.99, 4.98))
    assert (found.verdict, found.candidate) == ("cannot tell", "diagonal-64") and "hardly lowered" in found.why[0]
