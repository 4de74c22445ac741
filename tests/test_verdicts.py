import itertools
import math
import re
from pathlib import Path

import pytest

from ctsft.errors import CTError
from ctsft.lab import predicates, verdicts
from ctsft.lab.claims import ARGUMENTS, applicable, expanded, read_claims
from ctsft.lab.compare import ArmRuns
from ctsft.lab.experiments import PAPERS, arms, read_laboratory
from ctsft.lab.predicates import PREDICATES
from ctsft.lab.second import second_look
from ctsft.lab.spec import Spec
from ctsft.lab.tables import short
from ctsft.lab.verdicts import judge, markdown
from synthetic import claim, laboratory, record, run

CLAIMS = read_claims(PAPERS / "claims.toml")
NOISE = (0.0, 0.004, -0.003, 0.002, -0.001)  # by seed; another for every run, see `noise`


def noise(spec):
    return NOISE[(spec.seed * (1 + spec.k) + spec.k) % 5]


def losing(loss):
    """A maker of records: the loss falls evenly to loss(spec) after the last update, plus a little noise."""

    def make(spec):
        last = loss(spec) + noise(spec)
        losses = [9.0 + (last - 9.0) * i / spec.steps for i in range(spec.steps + 1)]
        return record(spec, losses, [[0, 9.0], [spec.steps, last]])

    return make


def verdict(one, loss, *given, seeds=5, make=None):
    """The verdict on one claim where loss(spec) is what a run ends at."""
    lab = laboratory(*(given or [{"k": [2, 4, 8, 16]}]), seeds=seeds)
    return judge([one], lab, run(lab, make or losing(loss)))[0]


def by_k(**losses):
    return lambda spec: losses[f"k{spec.k}"]


# ------------------------------------------------------------------------------------------------- every predicate

K = {"k": [2, 4, 8, 16]}
CURVE = {  # K-steps to loss: K=16 behind K=2 at 160, ahead at 320
    "ahead": {2: (8.5, 8.0), 16: (8.7, 7.5)},
    "never": {2: (8.5, 8.0), 16: (8.7, 8.3)},
}


def crossing(which):
    def make(spec):
        first, last = CURVE[which][spec.k]
        losses = [9.0] * (spec.steps + 1)
        losses[160 // spec.k], losses[320 // spec.k] = first + noise(spec), last + noise(spec)
        return record(spec, losses)

    return make


def scaled(factor):
    """trained = factor K"""
    return lambda spec: record(spec, trained=factor * spec.k)


def covering(exponent):
    """coverage = K ** exponent / 1000, the loss falling with it if the exponent is positive."""

    def make(spec):
        found = losing(lambda s: 8 - 0.1 * math.log2(s.k))(spec)
        share = spec.k**exponent / 1000 * (1 + noise(spec) / 10)
        return found.model_copy(update={"probes": {"coverage_diagonal": [(0, share)]}})

    return make


FALLING = by_k(k2=8.0, k4=7.5, k8=7.2, k16=7.0)  # gains a step 0.5, 0.3, 0.2
RISING = by_k(k2=7.0, k4=7.2, k8=7.5, k16=8.0)
LEVEL = by_k(k2=8.0, k4=7.98, k8=7.96, k16=7.94)  # each step just the effect of 0.02
CASES = {  # predicate: (claim, maker that confirms it, one that refutes it, one that leaves it open)
    "less": (claim("less", a={"k": 16}, b={"k": [2, 4, 8]}), losing(FALLING), losing(RISING), losing(LEVEL)),
    "near": (
        claim("near", a={"k": 2}, b={"k": 4}, number=0.5, effect=0.1),
        losing(FALLING),
        losing(RISING),
        losing(by_k(k2=8.0, k4=7.4, k8=7, k16=7)),
    ),
    "above": (
        claim("above", a={"k": [4, 8]}, number=7.1),
        losing(FALLING),
        losing(by_k(k2=8, k4=7.5, k8=7.0, k16=7)),
        losing(by_k(k2=8, k4=7.5, k8=7.12, k16=7)),
    ),
    "below": (
        claim("below", a={"k": 16}, b={"k": 2}, of="ratio", number=0.9, effect=0.0),
        losing(FALLING),
        losing(RISING),
        losing(by_k(k2=8.0, k4=7.5, k8=7, k16=7.2)),
    ),
    "ordered": (claim("ordered", a=K, along="k", direction="falls"), losing(FALLING), losing(RISING), losing(LEVEL)),
    "best": (
        claim("best", a=K, along="k", value=16, mode="min"),
        losing(FALLING),
        losing(RISING),
        losing(by_k(k2=8.0, k4=7.5, k8=7.02, k16=7.0)),
    ),
    "correlation": (
        claim("correlation", metric="coverage_diagonal", a=K, against_metric="train_loss", number=-0.9, effect=0.0),
        covering(0.5),
        covering(-0.5),
        covering(1.8),
    ),
    "slope": (
        claim("slope", metric="coverage_diagonal", a=K, along="k", law="power", number=1.0, effect=0.1),
        covering(1.0),
        covering(2.0),
        covering(1.1),
    ),
    "crossover": (
        claim("crossover", a={"k": 16}, b={"k": 2}, budgets=[160, 320]),
        crossing("ahead"),
        crossing("never"),
        None,
    ),
    "exact": (
        claim("exact", metric="trained", a=K, number=33, per="k", effect=0.0),
        scaled(33),
        scaled(32),
        None,
    ),
}


def judged(name, make, seeds=5):
    arm = {"k": [2, 4, 8, 16]}
    if name == "crossover":
        return verdict(CASES[name][0], None, {"k": 2, "steps": 160}, {"k": 16, "steps": 20}, make=make, seeds=seeds)
    return verdict(CASES[name][0], None, arm, make=make, seeds=seeds)


def test_every_predicate_has_a_case():
    assert set(CASES) == set(ARGUMENTS) == {*PREDICATES, "exact"}


@pytest.mark.parametrize("name", CASES)
def test_a_predicate_is_confirmed(name):
    found = judged(name, CASES[name][1])
    assert found.verdict == "confirmed", found.detail
    assert name == "exact" or (found.p <= 0.05 and found.seeds == 5)


@pytest.mark.parametrize("name", CASES)
def test_a_predicate_is_refuted(name):
    found = judged(name, CASES[name][2])
    assert found.verdict == "refuted", found.detail


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][3]])
def test_a_predicate_is_left_open(name):
    found = judged(name, CASES[name][3])
    assert found.verdict == "inconclusive", found.detail


@pytest.mark.parametrize("name", [name for name in CASES if name != "exact"])
@pytest.mark.parametrize("seeds", [1, 2])
def test_one_or_two_seeds_give_no_verdict(name, seeds):
    for make in CASES[name][1:3]:
        found = judged(name, make, seeds)
        assert found.verdict == "inconclusive"
        assert f"{seeds} seeds (fewer than 3: no verdict)" in found.detail


@pytest.mark.parametrize("name", CASES)
def test_a_predicate_without_its_runs(name):
    lab = laboratory({"k": [2, 4, 8, 16], "name": "fixed K"})
    found = judge([CASES[name][0]], lab, {})[0]
    assert found.verdict == "not run"
    assert "fixed K" in found.detail and "0 of 5 seeds" in found.detail


def test_gains_that_shrink():
    step = claim("ordered", metric="loss_drop", a=K, along="k", gains="step", direction="falls")
    assert verdict(step, FALLING).verdict == "confirmed"
    assert verdict(step, by_k(k2=8.0, k4=7.8, k8=7.5, k16=7.0)).verdict == "refuted"
    unit = claim("ordered", metric="loss_drop", a=K, along="k", gains="unit", direction="falls", effect=0.0)
    assert verdict(unit, by_k(k2=8.0, k4=7.8, k8=7.6, k16=7.4)).verdict == "confirmed"
    assert verdict(unit, by_k(k2=8.0, k4=7.8, k8=7.3, k16=6.0)).verdict == "refuted"
    assert verdict(step, by_k(k2=8.0, k4=7.8, k8=7.6, k16=7.4)).verdict == "refuted"  # level gains do not fall


def test_one_arm_by_two_metrics():
    one = claim("above", metric="first_loss", a={"k": 4}, against_metric="train_loss", number=1.0)
    found = verdict(one, FALLING)
    assert found.verdict == "confirmed"
    assert "first_loss minus train_loss of k 4" in found.detail
    assert verdict(one, by_k(k2=8, k4=8.5, k8=8, k16=8)).verdict == "refuted"


@pytest.mark.parametrize(
    ("over", "number", "wanted"), [("mean", 7.5, "confirmed"), ("mean", 7.4, "refuted"), ("max", 8.1, "confirmed")]
)
def test_all_arms_that_fit_as_one_number(over, number, wanted):
    """K = 2, 4, 8, 16 end at 8.0, 7.5, 7.2, 7.0: 7.425 on average."""
    one = claim("below", over=over, number=number, effect=0.0)
    found = verdict(one, FALLING)
    assert found.verdict == wanted and "of 4 arms is" in found.detail
    assert verdict(claim("below", over="max", a={"tied": False}, number=1.0), FALLING).verdict == "not run"
    lab = laboratory(K)
    records = run(lab, losing(FALLING))
    del records[next(iter(records))]
    assert judge([one], lab, records)[0].verdict == "not run"


def test_the_worst_of_several_decides():
    """Below every other: one that is not is enough to refute, and is the one that is told."""
    found = verdict(claim("less", a={"k": 16}, b={"k": [2, 4, 8]}), by_k(k2=8, k4=6.5, k8=8, k16=7))
    assert found.verdict == "refuted"
    assert "k 4 minus k 16 is -0.5" in found.detail


def test_exact_tells_the_run_that_differs():
    found = judged("exact", lambda spec: record(spec, trained=33 * spec.k + (spec.k == 8 and spec.seed == 3)))
    assert (found.verdict, found.detail) == ("refuted", "trained of k 8 is 265 at seed 3, not 264 (33 x k)")
    assert "in all 20 runs" in judged("exact", scaled(33)).detail


# --------------------------------------------------------------------------------------------------- what is told


def test_the_detail_has_the_numbers():
    found = verdict(claim("less", a={"k": 4}, b={"k": 2}), by_k(k2=8.0, k4=7.5, k8=7, k16=7))
    assert found.detail.startswith("k 2 minus k 4 is 0.5014 [0.498, 0.5048], claimed above 0.02; p ")
    assert found.detail.endswith("5 seeds; train_loss 7.499 (k 4), 8 (k 2)")


def test_an_arm_alone_has_no_name_and_is_told_once():
    found = verdict(claim("above", where={"k": 4}, number=7.1), FALLING)
    assert found.detail.startswith("train_loss is 7.499 [") and found.detail.endswith(" seeds")
    exact = claim("exact", metric="trained", where={"k": 4}, number=132, effect=0.0)
    assert verdict(exact, None, make=scaled(33)).detail == "trained is 132 in all 5 runs"
    assert verdict(exact, None, make=scaled(32)).detail.startswith("trained is 128 at seed ")


def test_the_side_that_decided_goes_with_the_verdict():
    found = verdict(claim("less", a={"k": 16}, b={"k": [2, 4, 8]}), by_k(k2=8, k4=6.5, k8=8, k16=7))
    assert found.side.label == "k 4 minus k 16" and found.side.test.mean == pytest.approx(-0.5, abs=0.02)
    assert found.detail.startswith(found.side.told())
    with_cause = claim("less", a={"k": 4}, b={"k": 2}, artefact={"cause": "None.", "control": {"a": {"k": 8}}})
    assert verdict(with_cause, FALLING).side.label == "k 2 minus k 4"


def test_the_rate_that_was_not_bracketed_is_told():
    lab = laboratory({"k": 4}, {"k": 2, "rates": [0.1, 1.0]})
    make = losing(lambda s: 7.0 if s.k == 4 else 8.0 - 0.1 * math.log10(s.lr))
    tuning = [
        spec for arm in arms(lab, "x") for e in range(-6, 9) for spec in arm.tuning(float(f"{10 ** (e / 2):.2g}"))
    ]
    records = {spec.key: make(spec) for spec in tuning}
    for arm in arms(lab, "x"):
        for lr in (0.1, 1000.0, *(float(f"{10 ** (e / 2):.2g}") for e in range(-6, 12))):
            records |= {spec.key: make(spec) for spec in (*arm.final(lr), *arm.tuning(lr))}
    found = judge([claim("less", a={"k": 4}, b={"k": 2})], lab, records)[0]
    assert found.verdict == "confirmed"
    assert "learning rate not bracketed: k 2" in found.detail


def diverging(seeds):
    def make(spec):
        if spec.k == 2 and spec.seed in seeds:
            return record(spec, [9.0, None], [[0, 9.0], [40, None]], diverged=True)
        return losing(FALLING)(spec)

    return make


def test_diverged_runs_are_left_out_and_told():
    one = claim("less", a={"k": 4}, b={"k": 2})
    found = verdict(one, None, make=diverging([3]))
    assert (found.verdict, found.seeds) == ("confirmed", 4)
    assert "1 runs of k 2 diverged" in found.detail
    found = verdict(one, None, make=diverging(range(5)))
    assert (found.verdict, found.seeds) == ("inconclusive", 0)
    assert "is not known: all runs diverged" in found.detail


def test_a_metric_that_was_not_measured():
    found = verdict(claim("above", metric="diversity.last", a={"k": 4}, number=1), FALLING)
    assert found.verdict == "not run"
    assert "diversity.last is not measured in arm [k 4]" in found.detail


def test_an_incomplete_arm_is_not_run():
    lab = laboratory({"k": [2, 4]})
    records = run(lab, losing(FALLING))
    records.pop(next(key for key, r in records.items() if r.spec.k == 2))
    found = judge([claim("less", a={"k": 4}, b={"k": 2})], lab, records)[0]
    assert (found.verdict, found.detail) == ("not run", "missing: arm [k 2] has 4 of 5 seeds")
    found = judge([claim("less", a={"k": 4}, b={"k": 64})], lab, records)[0]
    assert "no arm with k=64" in found.detail


# ----------------------------------------------------------------------------------------------------- selections


def test_a_field_left_out_stands_at_its_default():
    one = claim("less", a={"k": 4}, b={"k": 2})
    both = {"k": [2, 4], "tied": [True, False], "batches": ["fixed", "fresh"]}
    wrong = losing(lambda s: FALLING(s) if s.tied and s.batches == "fixed" else RISING(s))
    assert verdict(one, None, both, make=wrong).verdict == "confirmed"


def test_a_selection_that_fits_several_arms():
    with pytest.raises(CTError, match=r"fits several arms: arm .*name more fields"):
        verdict(claim("less", a={"k": 4}, b={"k": 2}), FALLING, {"k": [2, 4], "steps": [10, 20]})


def test_values_listed_in_where_go_together():
    """With tied 2 below 4, without it is the other way round: only with its own is each held against the other."""
    one = claim("less", where={"tied": [True, False]}, a={"k": 4}, b={"k": 2})
    both = {"k": [2, 4], "tied": [True, False]}
    level = losing(lambda s: 8.0 * s.tied + 0.1 * s.k if s.tied else 7.0 - 0.1 * s.k)
    found = verdict(one, None, both, make=level)
    assert found.verdict == "refuted" and found.side.label == "tied True, k 2 minus tied True, k 4"
    falls = losing(lambda s: 8.0 * s.tied - 0.1 * s.k)
    assert verdict(one, None, both, make=falls).verdict == "confirmed"
    assert (
        verdict(
            claim("less", where={}, a={"k": 4, "tied": [True, False]}, b={"k": 2, "tied": [True, False]}),
            None,
            both,
            make=falls,
        ).verdict
        == "refuted"
    )
    number = claim("near", where={"tied": [True, False]}, a={"k": 4}, b={"k": 2}, number=-0.2)
    assert verdict(number, None, both, make=falls).verdict == "confirmed"


def test_steps_of_a_budget():
    one = claim("less", where={"steps": "160/k"}, a={"k": 4}, b={"k": 2})
    found = verdict(one, FALLING, {"k": 2, "steps": [40, 80]}, {"k": 4, "steps": [40, 80]})
    assert (found.verdict, found.detail.split(" is ")[0]) == ("confirmed", "k 2 minus k 4")


def test_an_experiment_can_be_named():
    lab = laboratory({"k": [2, 4]})
    lab = lab.model_copy(update={"experiments": {n: lab.experiments["x"].model_copy() for n in ("x", "y")}})
    one = claim("less", experiments=["x", "y"], a={"k": 4, "experiment": "y"}, b={"k": 2, "experiment": "x"})
    assert judge([one], lab, run(lab, losing(FALLING)))[0].verdict == "confirmed"
    with pytest.raises(CTError, match="no experiment 'z'"):
        judge([claim("less", experiments=["z"], a={"k": 4}, b={"k": 2})], lab, {})


# ------------------------------------------------------------------------------------------------------- artefacts

ARTEFACT = claim(
    "less",
    where={"tied": False},
    a={"k": 16},
    b={"k": 8},
    artefact={"cause": "The head was untied.", "control": {"where": {"tied": True}}},
)


@pytest.mark.parametrize(
    ("untied", "tied", "wanted"),
    [
        (0.5, -0.5, "artefact"),
        (0.5, 0.5, "confirmed"),
        (0.5, 0.02, "inconclusive"),
        (-0.5, 0.5, "refuted"),
        (-0.5, -0.5, "refuted"),
        (0.02, -0.5, "inconclusive"),
    ],
)
def test_the_control_decides_what_is_an_artefact(untied, tied, wanted):
    found = verdict(
        ARTEFACT,
        lambda s: 8.0 - (s.k == 16) * (tied if s.tied else untied),
        {"k": [8, 16], "tied": [True, False]},
    )
    assert found.verdict == wanted, found.detail
    assert found.control.startswith("control (tied True) ")
    assert (found.verdict == "artefact") == found.detail.startswith(
        "The head was untied. As the paper has it: k 8 minus"
    )


def test_a_claim_waits_for_its_control():
    found = verdict(ARTEFACT, lambda s: 8.0 - (s.k == 16), {"k": [8, 16], "tied": False})
    assert found.verdict == "inconclusive"
    assert found.detail.startswith("holds as the paper has it, its control is open")
    assert "no arm with tied=True" in found.control


# --------------------------------------------------------------------------------------------- Holm over the file


def test_the_correction_counts_every_claim_and_control():
    """One p of about 0.03 stands alone, and falls among others of its family, whether those were run or not."""
    lab = laboratory({"k": [2, 4]}, {"k": [8, 16], "tied": [True, False]})
    make = losing(lambda s: 7.0 if s.k == 2 else 7.0245)
    records = {key: r for key, r in run(lab, make).items() if r.spec.k in (2, 4)}
    one = claim("less", a={"k": 2}, b={"k": 4})
    alone = judge([one], lab, records)
    others = [claim("exact", a={"k": 2}, number=0, effect=99), claim("less", source="82", a={"k": 2}, b={"k": 4})]
    later = claim("less", id="81.late", family="81-late", a={"k": 2}, b={"k": 4})
    many = judge([one, ARTEFACT, *others, later], lab, records)
    assert (alone.tests, many.tests) == ({"81": 1}, {"81": 3, "82": 1, "81-late": 1})
    assert many[-1].p == many[-2].p == alone[0].p  # families of their own
    assert many[0].p == pytest.approx(3 * alone[0].p)
    assert (alone[0].verdict, many[0].verdict) == ("confirmed", "inconclusive"), alone[0].p


# ------------------------------------------------------------------------------------------------------- two looks

ONE = claim("less", a={"k": 2}, b={"k": 4})
NEAR_BOUND = losing(lambda spec: 7.0 if spec.k == 2 else 7.0245)  # five seeds leave it open, twelve do not


def twice(*given, second=12):
    lab = laboratory(*(given or [{"k": [2, 4]}]))
    return lab.model_copy(update={"profiles": {"full": lab.profiles["full"].model_copy(update={"second": second})}})


def both_looks(lab, make, seeds=12):
    """Records of all arms with so many seeds."""
    return {s.key: make(s) for arm in arms(lab, "x", second=True) for s in arm.final(0.1) if s.seed < seeds}


def test_an_open_claim_is_judged_once_more_when_all_twelve_seeds_are_there():
    lab = twice()
    first, eleven, second = (judge([ONE], lab, both_looks(lab, NEAR_BOUND, seeds))[0] for seeds in (5, 11, 12))
    assert [(v.verdict, v.seeds) for v in (first, eleven, second)] == [
        ("inconclusive", 5),
        ("inconclusive", 5),
        ("confirmed", 12),
    ]
    assert first.p == eleven.p
    for found, n in ((first, 5), (second, 12)):
        one_look = judge([ONE], laboratory({"k": [2, 4]}, seeds=n), both_looks(lab, NEAR_BOUND))[0]
        assert found.p == pytest.approx(2 * one_look.p)


def test_a_verdict_of_the_first_look_stands():
    """What seven more seeds would say does not count against it, and the first look is what is told."""
    lab = twice()

    make = losing(lambda spec: 7.0 + (spec.k == 2) * (0.05 if spec.seed > 4 else -0.2))
    first, second = (judge([ONE], lab, both_looks(lab, make, seeds))[0] for seeds in (5, 12))
    assert (second.verdict, second.detail, second.p) == (first.verdict, first.detail, first.p)
    assert (second.verdict, second.seeds) == ("confirmed", 5)


def test_a_reference_arm_counts_as_one_that_the_claim_reads():
    lab = twice({"k": [2, 4]}, {"method": "lora", "k": 8})
    one = claim("less", metric="fraction_of_lora_r8", effect=0.02, a={"k": 2}, b={"k": 4})
    records = both_looks(lab, losing(by_k(k2=7.0, k4=6.96, k8=7.0)), 5)
    (found,) = judge([one], lab, records)
    assert found.verdict == "inconclusive" and {arm.spec.k for arm in found.due} == {2, 4, 8}, found.detail
    (found,) = judge([one], lab, {key: r for key, r in records.items() if (r.spec.k, r.spec.seed) != (8, 4)})
    assert found.verdict == "not run" and "has 4 of 5 seeds" in found.detail


def test_the_second_look_asks_for_what_open_claims_lack_the_cheapest_first():
    lab = twice({"k": [2, 4]}, {"k": [8, 16], "steps": 80}, {"k": 32})
    loss = by_k(k2=7.0, k4=7.0245, k8=7.0, k16=7.0245, k32=5.0)
    records = both_looks(lab, losing(loss), 5)
    claims = [
        claim("less", id="long", a={"k": 8}, b={"k": 16}),
        claim("less", id="decided", a={"k": 32}, b={"k": 2}),
        claim("less", id="short", a={"k": 2}, b={"k": 4}),
        claim("less", id="not run", a={"k": 64}, b={"k": 4}),
    ]
    found = second_look(judge(claims, lab, records), records, 12)
    assert [(v.claim.id, [arm.spec.k for arm in every]) for v, every, _ in found] == [
        ("short", [2, 4]),
        ("long", [8, 16]),
    ]
    assert [seconds for *_, seconds in found] == pytest.approx([2 * 7 * 8.0, 2 * 7 * 16.0])
    short = found[0][1]
    assert [s.seed for s in short[0].final(short[0].rates[0]) if s.key not in records] == list(range(5, 12))
    records |= {s.key: losing(loss)(s) for arm in short for s in arm.final(0.1)}
    assert [v.claim.id for v, *_ in second_look(judge(claims, lab, records), records, 12)] == ["long"]


def test_an_open_control_is_asked_for_with_its_claim_and_not_where_the_claim_fails():
    lab = twice({"k": [8, 16], "tied": [True, False]})
    for ahead, wanted in ((0.5, {True}), (-0.5, set())):
        records = both_looks(lab, losing(lambda s, by=ahead: 8.0 - (s.k == 16) * (0.02 if s.tied else by)), 5)
        (found,) = judge([ARTEFACT], lab, records)
        assert {arm.spec.tied for arm in found.due} == wanted


# ------------------------------------------------------------------------------------------- claims that stay open


def seeds_told(found):
    return int(re.search(r"takes ([\d,]+) seeds", found.unsettled)[1])


def test_an_open_claim_says_what_is_ruled_out_and_how_many_seeds_settle_it():
    """Its bound is not ruled out; with as many seeds as it says it is settled, and the way it says."""
    for gap, word in ((0.0226, "confirmed"), (0.0202, "refuted")):  # the noise takes 0.0014 of it
        make = losing(lambda spec, by=gap: 7.0 + (spec.k == 4) * by)
        found = judge([ONE], twice(), both_looks(twice(), make, 5))[0]
        low, high = map(float, re.findall(r"(?:below|above) (-?[\d.]+)", found.unsettled))
        assert low < 0.02 < high and f"{short(high)} nats per token. To settle" in found.unsettled
        assert found.unsettled.endswith(f"if it is {word} as it now looks.")
        n = seeds_told(found)
        later = twice(second=n + 8)
        assert judge([ONE], later, both_looks(later, make, n + 8))[0].verdict == word


def test_the_side_that_is_hardest_to_show_counts_the_seeds():
    one = claim("less", a={"k": 2}, b={"k": [4, 8]})
    loss = by_k(k2=7.0, k4=7.0245, k8=7.022)
    lab = twice({"k": [2, 4, 8]})
    found = judge([one], lab, both_looks(lab, losing(loss), 5))[0]
    alone = [judge([claim("less", a={"k": 2}, b={"k": k})], lab, both_looks(lab, losing(loss), 5))[0] for k in (4, 8)]
    assert seeds_told(found) == max(map(seeds_told, alone))


def test_only_open_claims_are_unsettled_and_the_page_says_it():
    lab = twice({"k": [2, 4, 8]})
    records = both_looks(lab, losing(by_k(k2=7.0, k4=7.0245, k8=8.0)), 5)
    claims = [ONE, claim("less", id="2", a={"k": 2}, b={"k": 8}), claim("less", id="3", a={"k": 2}, b={"k": 16})]
    found = judge(claims, lab, records)
    assert [bool(v.unsettled) for v in found] == [True, False, False]
    assert f"<br>{found[0].unsettled} |" in markdown(found)


# ----------------------------------------------------------------------------------------- the claims of the papers


LABORATORY = read_laboratory()
ARMS = {name: list(arms(LABORATORY, name)) for name in LABORATORY.experiments}
EVERY = [one for c in CLAIMS for one in ([c, c.control()] if c.artefact else [c])]
NAMES = [f"{one.id}{'' if i == 0 or EVERY[i - 1].id != one.id else '-control'}" for i, one in enumerate(EVERY)]


class World:
    """What every arm measures, so that one claim holds, or does not."""

    def __init__(self, one, holds):
        self.one, self.holds = one, holds
        self.edge = one.effect + (0.1 * one.effect or 1e-3)  # just beyond the effect
        self.short = one.effect - (0.1 * one.effect or 1e-3)
        self.every = expanded(one.where | one.a)

    def fits(self, spec, selections):
        model = Path(spec.model).name
        told = [{n: v for n, v in one.items() if n != "experiment"} for one in selections]
        return any(all((model if n == "model" else getattr(spec, n)) == v for n, v in one.items()) for one in told)

    def value(self, spec, metric):
        if metric in Spec.model_fields:
            return getattr(spec, metric)
        first = metric == self.one.metric and self.fits(spec, self.every)
        return getattr(self, self.one.predicate)(spec, metric, first)

    def less(self, spec, metric, first):
        return 1.0 if first else 1.0 + (self.edge if self.holds else self.short)

    def quantity(self, target, first):
        alone = not self.one.b and not self.one.against_metric
        if self.one.of == "ratio" or alone:
            return target if first else 1.0
        return 1.0 + target if first else 1.0

    def near(self, spec, metric, first):
        return self.quantity(self.one.number + (0 if self.holds else self.edge), first)

    def above(self, spec, metric, first):
        return self.quantity(self.one.number + (self.edge if self.holds else self.short), first)

    def below(self, spec, metric, first):
        return self.quantity(self.one.number - (self.edge if self.holds else self.short), first)

    def ordered(self, spec, metric, first):
        x, sign = getattr(spec, self.one.along), 1 if (self.one.direction == "rises") == self.holds else -1
        rank = sorted(one[self.one.along] for one in self.every).index(x)
        if self.one.gains:
            return 10.0 + sign * (rank**2 if self.one.gains == "step" else x**2)
        return 10.0 + sign * 2 * self.edge * rank

    def best(self, spec, metric, first):
        if getattr(spec, self.one.along) == self.one.value:
            return 1.0
        return 1.0 + (self.edge if self.holds else self.short) * (1 if self.one.mode == "min" else -1)

    def correlation(self, spec, metric, first):
        up = (self.one.number >= 0) == self.holds
        return math.log2(spec.k) * (1 if up or first else -1) + 10

    def slope(self, spec, metric, first):
        slope = self.one.number + (0 if self.holds else self.edge)
        return slope * spec.k if self.one.law == "linear" else spec.k**slope

    def crossover(self, spec, metric, first):
        a = self.fits(spec, self.every)
        ahead = metric == f"{self.one.metric}@{self.one.budgets[1]}/k"
        gain = self.edge if self.holds or ahead else self.short
        return 1.0 + gain * (a != ahead)

    def exact(self, spec, metric, first):
        wanted = self.one.number * (getattr(spec, self.one.per) if self.one.per else 1)
        return wanted + (0 if self.holds else 2 * self.one.effect + 1)


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("one", EVERY, ids=NAMES)
def test_every_claim_can_hold_and_can_fail(one, holds, monkeypatch):
    """In a world made so that it holds it is confirmed; in one where it just fails, refuted."""
    world = World(one, holds)

    def made_runs(laboratory, name, *_):
        full = [record(Spec(steps=0, seed=s)) for s in range(5)]
        return [ArmRuns(arm.name, arm.spec, 0.1, True, tuple(range(5)), full) for arm in ARMS[name]]

    def made_numbers(arm, pool, metric):
        scale = 1e-4 * min(1e-3, 0.1 * one.effect or 1e-3) if one.predicate != "exact" else 0
        return [
            world.value(arm.spec, metric) + scale * noise(arm.spec.model_copy(update={"seed": s})) for s in range(5)
        ]

    monkeypatch.setattr(verdicts, "arm_runs", made_runs)
    monkeypatch.setattr(predicates, "measured", made_numbers)
    plain = one.model_copy(update={"artefact": None})
    found = judge([plain], LABORATORY, {})[0]
    assert found.verdict == ("confirmed" if holds else "refuted"), found.detail


def test_every_claim_reads_what_its_runs_measure():
    """With whole records of the full profile no claim lacks an arm or a measurement, and each has enough seeds."""
    records = {}
    for arm in itertools.chain(*ARMS.values()):
        records |= {spec.key: record(spec) for spec in arm.final(arm.rates[0])}

    def untuned(laboratory, name, known, *_):
        return [
            ArmRuns(arm.name, arm.spec, arm.rates[0], True, arm.seeds, [known[s.key] for s in arm.final(arm.rates[0])])
            for arm in ARMS[name]
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdicts, "arm_runs", untuned)
        found = judge(CLAIMS, LABORATORY, records)
    assert not [(v.claim.id, v.detail) for v in found if v.verdict == "not run"]
    assert not [(v.claim.id, v.control) for v in found if ") not run: " in v.control]
    few = {v.claim.id for v in found if v.claim.predicate != "exact" and v.seeds < 3}
    assert few == set(), "these can never get a verdict: give their arms three seeds"


# ------------------------------------------------------------------------------------------ claims that are left out


def test_claims_set_aside_are_told_and_not_counted():
    """Their experiment need not exist, and the correction is for the claims that are judged."""
    kept, left = claim("less", a={"k": 4}, b={"k": 2}), claim("less", id="2", experiments=["z"], a={"k": 4}, b={"k": 2})
    lab = laboratory({"k": [2, 4]})
    found = judge([left, kept], lab, run(lab, losing(FALLING)), aside={"2": "experiment z was not run"})
    assert [(v.claim.id, v.verdict) for v in found] == [("2", "not applicable"), ("1", "confirmed")]
    assert (found[0].detail, found.tests) == ("experiment z was not run", {"81": 1})
    text = markdown(found, "runs of my/model")
    assert "1 confirmed, 0 refuted, 0 artefact, 0 inconclusive, 0 not run, 1 not applicable: 2" in text
    assert "from runs of my/model; do not edit." in text
    assert text.endswith(
        "## Not applicable\n\n| | claim | why |\n|---|---|---|\n| 2 | It is so. | experiment z was not run |\n"
    )
    assert text.count("| 2 |") == 1


def test_a_claim_of_one_model_is_judged_on_another():
    one = claim("less", where={"model": "photonic"}, a={"k": 4}, b={"k": 2}, any_model=True)
    lab = laboratory({"k": [2, 4], "model": "my/own"})
    asked, aside = applicable([one], ["x"], "my/own")
    found = judge(asked, lab, run(lab, losing(FALLING)), aside=aside)[0]
    assert (found.verdict, found.detail.split(" is ")[0]) == ("confirmed", "k 2 minus k 4")


# --------------------------------------------------------------------------------------------------------- markdown


def test_markdown():
    lab = laboratory({"k": [2, 4, 8, 16], "tied": [True, False]})
    records = run(lab, losing(lambda s: FALLING(s) if s.tied else RISING(s)))
    claims = [
        claim("less", id="ours.1", source="ours", a={"k": 4}, b={"k": 2}, text="Ours | holds."),
        claim("less", id="81.1", a={"k": 2}, b={"k": 4}, note="A note."),
        claim("less", id="81.2", where={"tied": False}, a={"k": 64}, b={"k": 4}),
        claim("near", id="84.1", source="84", a={"k": 2}, b={"k": 4}, number=0.5, effect=0.1),
    ]
    text = markdown(judge(claims, lab, records))
    assert text == markdown(judge(claims, lab, dict(reversed(records.items()))))
    assert "2 confirmed, 1 refuted, 0 artefact, 0 inconclusive, 1 not run: 4 claims." in text
    assert "Profile `full`, 40 records." in text and "Families and tests: ours 1, 81 2, 84 1." in text
    assert "after correction for one look and" in text
    order = [text.index(head) for head in ("## Paper 81", "| 81.1 |", "| 81.2 |", "## Paper 84", "## Our own")]
    assert order == sorted(order)
    assert "| 81.1 | It is so. | **refuted** | k 4 minus k 2 is -0.5" in text
    assert "<br>Note: A note. |" in text
    assert "Ours \\| holds." in text
    assert all(line.count(" | ") == 3 for line in text.splitlines() if line.startswith(("| 8", "| ours")))


def test_no_record_means_not_run_everywhere():
    found = judge(CLAIMS, LABORATORY, {})
    assert {v.verdict for v in found} == {"not run"}
    assert f"{len(CLAIMS)} not run" in markdown(found)
