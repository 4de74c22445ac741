import statistics

import pytest

from ctsft.errors import CTError
from ctsft.lab.compare import ArmRuns, arm_runs, chosen, mean, measured, relative, sd
from ctsft.lab.experiments import arms
from ctsft.lab.metrics import check_metric
from ctsft.lab.spec import Spec
from synthetic import laboratory, record, run


def losing(losses):
    """A maker of records whose last loss is losses[k] + seed / 100."""
    return lambda spec: record(spec, [9.0, losses[spec.k] + spec.seed / 100], [[0, 9.0], [40, 8.0]])


def test_arms_of_an_experiment():
    lab = laboratory({"name": "fixed K", "k": [2, 4]}, seeds=3)
    records = run(lab, losing({2: 8.0, 4: 7.0}))
    first, second = arm_runs(lab, "x", records)
    assert (first.name, first.spec.k, first.lr, first.seeds, first.tuned) == ("fixed K", 2, 0.1, (0, 1, 2), False)
    assert first.complete
    assert first.values("train_loss") == pytest.approx([8.0, 8.01, 8.02])
    assert second.mean("train_loss") == pytest.approx(7.01)
    assert sd(second.values("train_loss")) == pytest.approx(0.01)
    del records[next(key for key, r in records.items() if r.spec.seed == 1 and r.spec.k == 2)]
    first, second = arm_runs(lab, "x", records)
    assert not first.complete and second.complete
    assert first.values("train_loss") == [pytest.approx(8.0), None, pytest.approx(8.02)]


def test_an_untuned_arm_has_no_rate_yet():
    lab = laboratory({"k": 2, "rates": [0.01, 0.1, 1.0]})
    (arm,) = arm_runs(lab, "x", {})
    assert (arm.lr, arm.tuned, arm.bracketed, arm.records) == (None, True, False, [])
    assert arm.values("train_loss") == [None] * 5


def test_mean_and_sd_of_what_is_there():
    assert mean([1.0, None, 3.0]) == 2
    assert sd([1.0, None, 3.0]) == pytest.approx(statistics.stdev([1, 3]))
    assert (mean([None]), sd([1.0, None])) == (None, None)


def test_chosen_knows_a_model_by_its_folder():
    arm = ArmRuns("a", Spec(model="some/where/stories15m", k=2), 0.1, True, (0,), [])
    assert chosen([arm], {"model": "stories15m", "k": [2, 4], "name": "a"}) == [arm]
    assert chosen([arm], {"model": "some/where/stories15m"}) == [arm]
    assert chosen([arm], {"model": "stories"}) == []


def dropping(spec):
    drop = {"lora": 2.0, "full": 4.0}.get(spec.method, 1.0) + spec.seed
    return record(spec, [9.0, 9.0 - drop / 2], [[0, 9.0], [40, 9.0 - drop]])


def test_relative_to_the_reference_of_the_same_seed():
    lab = laboratory(
        {"k": 4, "model": ["photonic", "other"]},
        {"method": "lora", "k": [1, 8], "model": "photonic"},
        {"method": "full", "k": 0, "targets": ["last2", "last2+head"]},
        seeds=2,
    )
    found = arm_runs(lab, "x", run(lab, dropping))
    assert relative(found[0], found, "fraction_of_lora_r8") == pytest.approx([1 / 2, 2 / 3])
    assert relative(found[0], found, "fraction_of_full_sft") == pytest.approx([1 / 4, 2 / 5])
    assert measured(found[0], found, "fraction_of_full_sft_train") == pytest.approx([1 / 4, 2 / 5])
    assert measured(found[0], found, "train_loss") == pytest.approx([8.5, 8.0])
    assert relative(found[1], found, "fraction_of_lora_r8") == [None, None]  # no LoRA on the other model
    with pytest.raises(CTError, match="is no relative metric"):
        relative(found[0], found, "train_loss")


def test_relative_needs_one_reference_and_a_drop():
    lab = laboratory({"k": 4}, {"method": "lora", "k": 8, "targets": ["blocks", "last2"]}, seeds=1)
    found = arm_runs(lab, "x", run(lab, dropping))
    with pytest.raises(CTError, match="has 2 reference arms"):
        relative(found[0], found, "fraction_of_lora_r8")
    lab = laboratory({"k": 4}, {"method": "lora", "k": 8}, seeds=1)
    found = arm_runs(lab, "x", run(lab, lambda spec: record(spec, None, [[0, 9.0], [40, 9.5]])))
    assert relative(found[0], found, "fraction_of_lora_r8") == [None]


def test_what_is_untrained_stands_beside_any_training():
    """Not so what was trained for other steps; and LoRA that began at the siblings' mean is no reference."""
    lora, siblings = {"method": "lora", "k": 8}, {"siblings": ["sql"], "start": "mean"}
    lab = laboratory({"k": 4, "steps": [0, 20]}, lora, lora | siblings, seeds=1)
    made = run(lab, lambda spec: record(spec, None, [[0, 9.0], [40, 8.5 if spec.method == "diagonal" else 7.0]]))
    untrained, shorter, *_ = found = arm_runs(lab, "x", made)
    assert relative(untrained, found, "fraction_of_lora_r8") == [0.25]
    assert relative(shorter, found, "fraction_of_lora_r8") == [None]


CROSSING = {  # by K: the loss after every update
    2: [9.0, 8.9, 8.0, 7.9, 7.0, 6.9, 6.0, 5.9, 5.0],  # at budgets of 4, 8, 12 and 16 K-steps 8, 7, 6 and 5
    4: [9.0, 8.5, 6.5, 5.5, 4.5],  # 8.5, 6.5, 5.5 and 4.5: below K=2 from 8 on
    16: [9.0, 4.9],  # shares the budget 16 alone: below K=2 there, above K=4
}


def by_rule(spec):
    """Tuned, the drop is 2 (seed 0) and 4; by a rule 1.5 and 5; with K=8 the second seed diverges."""
    drop = (2.0, 4.0)[spec.seed] if not spec.rule else (1.5, 5.0)[spec.seed]
    lost = bool(spec.rule) and spec.k == 8 and spec.seed == 1
    return record(spec, None, [[0, 9.0], [40, None if lost else 9.0 - drop]], diverged=lost)


def test_the_share_of_the_tuned_drop_that_a_rule_loses():
    lab = laboratory({"k": [4, 8], "rule": ["", "auto", "line"], "rates": [0.1, 0.2]}, seeds=2)
    records = run(lab, by_rule)
    tuned, rule = ([r for r in records.values() if bool(r.spec.rule) == ruled] for ruled in (False, True))
    found = [
        ArmRuns(
            "arm", Spec(k=k, rule=name), 0.1, True, (0, 1), [r for r in every if (r.spec.k, r.spec.rule) == (k, name)]
        )
        for k in (4, 8)
        for name, every in (("", tuned), ("auto", rule))
    ]
    assert [measured(arm, found, "drop_lost") for arm in found] == [
        [None, None],
        pytest.approx([0.25, -0.25]),
        [None, None],
        pytest.approx([0.25, 1.0]),
    ]
    assert measured(found[1], found[1:], "drop_lost") == [None, None]  # nothing that is tuned
    fixed = ArmRuns(*("arm", found[0].spec, 0.1, False, (0, 1), found[0].records), tuned=False)
    assert measured(found[1], [fixed, found[1]], "drop_lost") == [None, None]
    assert measured(found[3], found, "diverged") == [0.0, 1.0]


def test_an_arm_with_a_rule_is_not_tuned():
    lab = laboratory({"k": 4, "rule": ["", "auto"], "rates": [0.1, 0.2, 0.4]})
    first, second = arms(lab, "x")
    assert (first.tunes, second.tunes) == (True, False)
    assert {s.lr for s in second.final(second.rates[0])} == {Spec().lr}


def crossing(*given, **changed):
    lab = laboratory(*(given or [{"k": 2, "steps": 8}, {"k": 4, "steps": 4}, {"k": 16, "steps": 1}]), seeds=3)
    losses = CROSSING | {int(name[1:]): found for name, found in changed.items()}
    found = arm_runs(lab, "x", run(lab, lambda spec: record(spec, losses[spec.k])))
    by_k = {arm.spec.k: arm for arm in found}
    return lambda k, rival: measured(by_k[k], found, f"ahead_of_k{rival}")


def test_the_budget_from_which_an_arm_stays_ahead():
    ahead = crossing()
    assert ahead(4, 2) == [8.0] * 3 and ahead(16, 2) == [16.0] * 3 and ahead(4, 16) == [16.0] * 3
    for k, rival in [(2, 4), (16, 4), (4, 4), (2, 64)]:
        assert ahead(k, rival) == [None] * 3
    check_metric("ahead_of_k2")
    with pytest.raises(CTError, match="ahead_of_kN"):
        check_metric("ahead_of_k")


def test_a_lead_that_is_lost_again_does_not_count():
    assert crossing(k4=[9.0, 7.5, 7.5, 5.5, 4.5])(4, 2) == [12.0] * 3  # ahead at 4, behind at 8, ahead from 12
    assert crossing(k4=[9.0, 7.5, 6.5, 5.5, 5.0])(4, 2) == [None] * 3  # level at the end
    assert crossing(k4=[9.0, 7.5, 6.5, 5.5, None])(4, 2) == [None] * 3  # diverged


def test_an_arm_of_another_setting_is_no_rival():
    assert crossing({"k": 2, "steps": 8, "tied": False}, {"k": 4, "steps": 4})(4, 2) == [None] * 3
    assert crossing({"k": 2, "steps": 8, "name": "other"}, {"k": 4, "steps": 4})(4, 2) == [None] * 3
