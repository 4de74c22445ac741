import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsft.lab.rates import GRID, MAX_RATES, choose_rate, due, finals, rate
from ctsft.lab.spec import TUNE_SEEDS, Arm, Spec, replaced
from synthetic import record


def arm(rates=(0.01, 0.03, 0.1), seeds=(0, 1), **changes):
    fields = {"spec": Spec(**changes.pop("spec", {}))} | changes
    return Arm(name="a", seeds=seeds, rates=rates, **fields)


def with_loss(spec, loss):
    """A record whose last losses are `loss`."""
    return record(spec, [9.0, loss], [(0, 9.0), (spec.steps, loss)])


def settle(an_arm, loss_of, records=None):
    """Run what is due until nothing is; `loss_of` a spec. Returns the records, in the order in which they were due."""
    records = {} if records is None else records
    while batch := due(an_arm, records):
        for spec in batch:
            assert spec.key not in records
            records[spec.key] = with_loss(spec, loss_of(spec))
        assert len(records) < 200
    return records


def bowl(centre):
    """The loss of a spec: a bowl over the logarithm of the rate."""
    return lambda spec: 5 + math.log10(spec.lr / centre) ** 2


def test_tuning_comes_first_and_leaves_the_judged_seeds_alone():
    an_arm = arm(
        spec={"steps": 80, "ablate": True, "probes": ("coverage",), "evaluate": (5,), "probe_every": 5},
        tune_steps=40,
        tune_seeds=2,
    )
    first = due(an_arm, {})
    assert [(s.lr, s.seed) for s in first] == [(lr, seed) for lr in (0.01, 0.03, 0.1) for seed in (1000, 1001)]
    assert all(s == Spec(lr=s.lr, seed=s.seed, steps=40) for s in first)  # shared with every arm that differs in probes
    records = {s.key: with_loss(s, bowl(0.03)(s)) for s in first}
    assert due(an_arm, records) == [replaced(an_arm.spec, lr=0.03, seed=seed) for seed in (0, 1)]
    assert not set(an_arm.seeds) & set(TUNE_SEEDS)


def test_tune_steps_never_lengthen_a_run():
    assert {s.steps for s in arm(spec={"steps": 20}, tune_steps=40).tuning(0.1)} == {20}


@pytest.mark.parametrize(
    ("centre", "best", "count"),
    [
        (0.03, 0.03, 3),  # inside at once
        (0.3, 0.32, 5),  # two rates more above
        (0.001, 0.001, 6),  # three below
        (0.011, 0.01, 4),
    ],
)
def test_the_grid_grows_until_its_best_is_inside(centre, best, count):
    an_arm = arm()
    records = settle(an_arm, bowl(centre))
    choice, runs = finals(an_arm, records)
    assert (choice.lr, choice.bracketed, len(choice.tried)) == (best, True, count)
    rates = [lr for lr, _ in choice.tried]
    assert rates == sorted(rates) and rates[0] < best < rates[-1]
    assert [r.spec.seed for r in runs] == [0, 1] and {r.spec.lr for r in runs} == {best}


@given(st.floats(-4, 1))
def test_the_choice_is_the_best_of_what_was_tried(exponent):
    an_arm = arm()
    choice = choose_rate(an_arm, settle(an_arm, bowl(10**exponent)))
    assert dict(choice.tried)[choice.lr] == min(loss for _, loss in choice.tried)
    assert choice.bracketed and abs(math.log10(choice.lr) - exponent) <= math.log10(GRID) / 2 + 0.03
    steps = [b / a for (a, _), (b, _) in zip(choice.tried, choice.tried[1:], strict=False)]
    assert all(2.9 < step < 3.4 for step in steps)


def test_an_optimum_that_is_never_inside_is_said_to_be_so():
    for centre, best in ((1e9, -1), (1e-9, 0)):
        choice = choose_rate(arm(), settle(arm(), bowl(centre)))
        assert len(choice.tried) == MAX_RATES and not choice.bracketed
        assert choice.lr == choice.tried[best][0]


def test_a_diverged_run_is_worse_than_any():
    def loss(spec):
        return None if spec.lr > 0.05 else bowl(0.03)(spec)

    assert choose_rate(arm(), settle(arm(), loss)).lr == 0.03
    one_seed = arm(tune_seeds=2)
    choice = choose_rate(
        one_seed, settle(one_seed, lambda s: None if s.lr == 0.03 and s.seed == 1000 else bowl(0.03)(s))
    )
    assert choice.lr != 0.03 and dict(choice.tried)[0.03] == math.inf


def test_when_all_diverge_smaller_rates_are_tried():
    choice = choose_rate(arm(), settle(arm(), lambda spec: None))
    assert len(choice.tried) == MAX_RATES and not choice.bracketed and choice.lr == choice.tried[0][0] < 1e-4


def test_fresh_batches_are_judged_on_held_out_text():
    def records(batches):
        an_arm = arm(spec={"batches": batches})
        runs = [spec for lr in an_arm.rates for spec in an_arm.tuning(lr)]
        return an_arm, {
            s.key: record(s, [9.0, 5 + abs(s.lr - 0.03)], [(0, 9.0), (40, 5 + abs(s.lr - 0.09))]) for s in runs
        }

    assert choose_rate(*records("fixed")).lr == 0.03
    assert [s.lr for s in choose_rate(*records("fresh")).due] == [0.32]  # 0.1 is best there, at the edge


def test_what_needs_no_tuning():
    assert choose_rate(arm(rates=(0.2,)), {}).lr == 0.2
    still = arm(spec={"steps": 0})
    assert not still.tunes and due(still, {}) == still.final(0.01)


def test_only_what_is_missing_is_due():
    an_arm = arm()
    records = settle(an_arm, bowl(0.03))
    lost = an_arm.final(0.03)[1]
    del records[lost.key]
    assert due(an_arm, records) == [lost]
    assert [r.spec.seed for r in finals(an_arm, records)[1]] == [0]
    assert finals(an_arm, {}) == (choose_rate(an_arm, {}), [])


@given(st.floats(1e-6, 1e3))
def test_rates_have_two_digits_and_stay_close(value):
    assert rate(rate(value)) == rate(value) == pytest.approx(value, rel=0.051)
