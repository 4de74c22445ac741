"""Metrics by windows of held-out text, and claims that are tested over them."""

import random

import pytest

from ctsft.lab.compare import arm_runs, measured, references
from ctsft.lab.verdicts import judge
from ctsft.lab.windows import by_window
from synthetic import claim, laboratory, record, run

PARTS = 12
LAB = laboratory(
    {"k": [4, 16], "batches": "fresh", "heldout_windows": 24},
    {"method": "lora", "k": 8, "batches": "fresh", "heldout_windows": 24},
)
DROPS = {4: 1.0, 16: 1.6, 8: 2.0}
HARD = random.Random(0)
WINDOW = [HARD.gauss(0, 0.2) for _ in range(PARTS)]  # how hard each is, for all runs


def made(gain=0.0):
    """Runs whose drop is that of their K, times what a window allows; `gain` is more for K = 16 on one of them."""

    def make(spec):
        own = random.Random(f"{spec.k} {spec.seed}")
        first = [8 + w for w in WINDOW]
        drops = [DROPS[spec.k] * (1 + w) + own.gauss(0, 0.02) for w in WINDOW]
        drops[0] += PARTS * gain * (spec.k == 16)
        last = [a - b for a, b in zip(first, drops, strict=True)]
        mean = [sum(first) / PARTS, sum(last) / PARTS]
        return record(
            spec,
            heldout=[[0, mean[0]], [spec.steps, mean[1]]],
            measures={"heldout_parts": {"first": first, "last": last}},
        )

    return make


def arms_of(records):
    found = arm_runs(LAB, "x", records)
    return next(a for a in found if a.spec.k == 16), found


@pytest.mark.parametrize("metric", ["heldout_loss", "heldout_drop", "fraction_of_lora_r8"])
def test_the_mean_over_windows_is_the_metric(metric):
    arm, arms = arms_of(run(LAB, made()))
    found = by_window(arm, references(arm, arms, metric), metric)
    means = [sum(found[seed]) / PARTS for seed in arm.seeds]
    assert means == pytest.approx(measured(arm, arms, metric)) and len(found[0]) == PARTS


def test_a_share_by_window_is_its_slope_in_that_window():
    records = run(LAB, made())
    arm, arms = arms_of(records)
    by = by_window(arm, references(arm, arms, "fraction_of_lora_r8"), "fraction_of_lora_r8")[0]
    first, own, other = (
        next(r.measures["heldout_parts"][which] for r in one.records if r.spec.seed == 0)
        for one, which in ((arm, "first"), (arm, "last"), (references(arm, arms, "fraction_of_lora_r8")[0], "last"))
    )

    def share(weights):  # with so much of every window
        a = sum(w * (f - x) for w, f, x in zip(weights, first, own, strict=True))
        return a / sum(w * (f - x) for w, f, x in zip(weights, first, other, strict=True))

    for j in range(PARTS):
        step = 1e-6
        more = [1 + step * (i == j) for i in range(PARTS)]
        slope = (share(more) - share([1] * PARTS)) / step
        assert by[j] - sum(by) / PARTS == pytest.approx(PARTS * slope, abs=1e-4)


def test_a_finding_that_rests_on_one_window_stays_open():
    """Seeds agree to a hundredth, so they alone would confirm it."""
    ahead = claim("above", metric="heldout_drop", a={"k": 16}, b={"k": 8}, number=0.0, effect=0.0)
    one = judge([ahead], LAB, run(LAB, made(gain=1.0)))[0]
    assert one.verdict == "inconclusive" and "over 12 windows" in one.detail and min(one.side.numbers) > 0.5
    assert "Ruled out" in one.unsettled and "seeds" not in one.unsettled
    bare = {
        key: r.model_copy(update={"measures": {}}) for key, r in run(LAB, made(gain=1.0)).items()
    }  # as older records are
    told = judge([ahead], LAB, bare)[0]
    assert told.verdict == "confirmed" and "windows" not in told.detail
    far = claim("above", metric="heldout_drop", a={"k": 16}, b={"k": 4}, number=0.0, effect=0.0)
    assert judge([far], LAB, run(LAB, made()))[0].verdict == "confirmed"


def test_runs_without_parts_and_other_metrics_have_no_windows():
    arm, _ = arms_of(run(LAB))
    assert by_window(arm, [], "heldout_loss") == {}
    arm, arms = arms_of(run(LAB, made()))
    assert by_window(arm, [], "train_loss") == by_window(arm, arms[:1], "fraction_of_full_sft_train") == {}
