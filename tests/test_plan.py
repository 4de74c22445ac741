"""A plan on a tiny model: what races, what is predicted from it, and that the time is kept."""

import io

import pytest
from rich.console import Console

from ctsft.errors import CTError
from ctsft.plan import plan as plans
from ctsft.plan.arms import candidate
from ctsft.plan.plan import KS, answered, command, heats, level, ordered, spelled
from ctsft.plan.predict import growth, predicted
from ctsft.plan.question import make_question
from ctsft.plan.record import Trial
from ctsft.plan.told import Plan


def quiet():
    return Console(file=io.StringIO())


def question(files, **changes):
    small = {"batch_size": 4, "heldout": 10, "max_length": 64, "steps": 24}
    return make_question({"model": files[0], "data": files[1]} | small | changes)


@pytest.fixture(scope="module")
def made(files):
    return answered(question(files), quiet())


def test_every_size_and_every_peer_is_weighed_the_smallest_first(made):
    names = [o.candidate for o in made.options]
    assert sorted(names) == sorted(
        ["diagonal-4", "diagonal-16", "diagonal-32", "gains-32", "lora-1", "lora-8", "vera-256"]
    )
    numbers = [o.trained for o in made.options]
    assert numbers == sorted(numbers) and made.options[0].candidate == "diagonal-4"
    assert [o.candidate for o in made.options if not o.ours] == ["lora-1", "vera-256", "lora-8"]
    assert all(o.raced and o.fits and o.steps == 24 for o in made.options)


def test_predictions_follow_from_the_races(made):
    assert made.race.steps == 12 and made.race.rows == 4 and made.race.heldout == made.heldout == 10
    for o in made.options:
        told = predicted(made.start, made.start - o.race, growth(12, 24, 4, 4, o.trained), 2.0)
        assert (o.loss, o.low, o.high) == (told.loss, told.low, told.high)
        assert o.race < made.start


def test_the_race_is_the_trial_that_the_comparison_runs(files, made):
    from ctsft.plan.trial import Bench
    from ctsft.tune.material import gathered

    found = gathered(question(files).recipe(eval_rows=48), quiet())
    bench = Bench(found.loaded.model, found.loaded.tokenizer.pad_token_id, found.train, found.heldout, 4)
    option = next(o for o in made.options if o.candidate == "diagonal-4")
    assert bench.trial(candidate("diagonal-4"), 0, 12, option.rate).end == option.race
    assert bench.start == made.start


def test_the_start_is_scored_on_all_rows_where_races_are_on_few(files):
    from ctsft.plan.trial import Bench
    from ctsft.tune.material import gathered

    asked = question(files, arms=["diagonal-4"], heldout=24, spend=1e-3)
    (option,) = (plan := answered(asked, quiet())).options
    found = gathered(asked.recipe(eval_rows=48), quiet())
    bench = Bench(found.loaded.model, found.loaded.tokenizer.pad_token_id, found.train, found.heldout[:16], 2)
    assert plan.race.heldout == 16 < len(found.heldout)
    assert plan.start == bench.loss(bench.model, found.heldout) != bench.start
    drop = bench.start - bench.trial(candidate("diagonal-4"), 0, 12, option.rate).end
    assert plan.start - option.race == pytest.approx(drop)


def test_a_training_far_beyond_what_was_seen_is_said_to_be(files, made):
    far = answered(question(files, steps=12 * 41, arms=["diagonal-4"], spend=1e-3), quiet())
    assert "41 times as long as a race. No training beyond 40 times was seen" in far.measured[-1]
    assert "times as long as a race" not in " ".join(made.measured)


def test_a_plan_survives_its_file(made):
    assert Plan.model_validate_json(made.model_dump_json()) == made


def test_a_budget_limits_numbers_and_sets_steps(files):
    found = answered(
        question(files, arms=["diagonal-2", "diagonal-8", "lora-1"], budget="50 numbers, 12 steps"), quiet()
    )
    assert [(o.candidate, o.fits, o.steps) for o in found.options] == [
        ("diagonal-2", True, 12), ("diagonal-8", False, 12), ("lora-1", False, 12),
    ]  # fmt: skip
    assert found.decision.candidate == "diagonal-2"


def test_a_budget_of_time_sets_the_steps_by_the_races_pace(files):
    found = answered(question(files, arms=["diagonal-4"], budget="30 s"), quiet())
    (option,) = found.options
    assert option.seconds <= 30 < option.seconds * (option.steps + 1) / option.steps


def test_what_has_no_time_to_run_is_predicted_from_what_ran(files, monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr(plans.time, "monotonic", lambda: float(next(now)))
    found = answered(question(files, arms=["diagonal-4", "diagonal-8", "diagonal-2"], spend=0.5), quiet())
    ran = [o.candidate for o in found.options if o.raced]
    assert ran == ["diagonal-4", "diagonal-8"] and found.race.rows == 2 and found.race.heldout == 10
    rest = next(o for o in found.options if not o.raced)
    assert rest.rate is None and rest.race is None and rest.trained == 2 * rest.trained // 2
    assert rest.high - rest.low > found.options[1].high - found.options[1].low
    assert "diagonal-2" in found.measured[-1]
    told = command(question(files), "diagonal-2", found.options)  # it has no rate of its own
    assert "--k 2 " in told and "--lr" not in told


def test_arms_are_asked_for_by_name_or_at_every_k():
    assert [a.name for a in spelled("core", (4, 16))] == ["core-4", "core-16"]
    assert [a.name for a in spelled("gains@weight", KS)][:2] == ["gains-4@weight", "gains-16@weight"]
    assert spelled("lora-2", KS) == [candidate("lora-2")]
    with pytest.raises(CTError, match="lora needs a K"):
        spelled("lora", KS)


def test_a_wrong_arm_is_told_before_the_model_is_loaded():
    with pytest.raises(CTError, match="no arm 'lorra-8'"):
        answered(make_question({"model": "not-there", "arms": ["lorra-8"]}), quiet())
    with pytest.raises(CTError, match="and lora-8, norms is none; name one of diagonal, core, gains, scores as"):
        answered(make_question({"model": "not-there", "arms": ["lora-8", "norms"]}), quiet())


def test_what_tells_most_runs_first_and_nothing_twice():
    names = ["diagonal-4", "vera-256", "gains-64", "lora-8", "diagonal-64", "diagonal-4"]
    assert [a.name for a in ordered([candidate(n) for n in names])][:3] == ["diagonal-64", "lora-8", "gains-64"]
    assert len(ordered([candidate(n) for n in names])) == 5


def test_races_shorten_until_all_arms_have_time():
    assert level(8, 1e-6, 60, 120, 8).model_dump() == {"steps": 12, "rows": 8, "heldout": 48}
    assert level(8, 1e-6, 60, 5, 2).model_dump() == {"steps": 5, "rows": 2, "heldout": 48}
    assert level(8, 1e3, 60, 120, 8).model_dump() == {"steps": 12, "rows": 2, "heldout": 16}
    sizes = [level(8, second, 60, 120, 8).rows for second in (1e-3, 0.015, 0.05)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2


def trial(name, trained, end):
    return Trial(
        candidate=name, seed=0, rate=0.3, steps=2, horizon=2, batch_size=1, train=[5.0, 4.0],
        heldout=[(0, 5.0), (2, end)], clock=[1.0, 2.0], trained=trained, adapter_bytes=1, memory_bytes=1,
        diverged=False,
    )  # fmt: skip


def heated(best, *names):
    """The races of arms whose losses are lowest at the powers `best`, as (K, power)."""
    tried, order = {}, []
    for arm, at in heats([candidate(name) for name in names], tried):
        order.append((arm.name, at))
        tried.setdefault(arm.name, {})[at] = trial(arm.name, arm.k, 4.0 + abs(at - best[arm.name]))
    return order


def test_what_won_for_the_first_arm_of_a_kind_is_tried_for_the_others():
    a, b, c = "diagonal-64", "lora-8", "diagonal-16"
    order = heated({a: 2, b: -1, c: 2}, a, b, c)
    assert order[:3] == [(a, 0), (b, 0), (c, 0)]
    assert order[3:7] == [(a, -1), (a, 1), (a, 2), (a, 3)]  # on until it is worse
    assert order[7] == (c, 2)  # before any time goes into a peer
    assert order[8:10] == [(b, -1), (b, -2)]  # never above the measured rate where a lower one is better
    assert order[10:] == [(c, 1), (c, 3)]


def test_ours_race_at_other_rates_before_the_lesser_yardsticks_race_at_all():
    a, b, c = "diagonal-64", "lora-8", "vera-256"
    order = heated({a: 1, b: 0, c: 0}, a, b, c)
    assert order[:5] == [(a, 0), (b, 0), (a, -1), (a, 1), (a, 2)]
    assert order[5:] == [(c, 0), (b, -1), (b, 1), (c, -1), (c, 1)]


def test_three_races_are_enough_where_the_measured_rate_is_right():
    order = heated({"lora-8": 0, "lora-1": 0}, "lora-8", "lora-1")
    assert sorted(order) == [(name, at) for name in ("lora-1", "lora-8") for at in (-1, 0, 1)]
    assert [name for name, _ in order] == ["lora-8", "lora-1", "lora-8", "lora-8", "lora-1", "lora-1"]


def test_the_command_trains_what_is_recommended(made):
    assert made.tune.startswith("ctsft tune --model ")
    assert f"--k {made.decision.candidate.partition('-')[2]} " in made.tune and "--steps 24 --batch-size 4" in made.tune
    assert "--heldout 10 --max-length 64 " in made.tune  # the rows are those that were raced on
    assert ("--lr" in made.tune) == made.chosen.again


def test_plans_are_public(files, made):
    import ctsft

    found = ctsft.make_plan(
        console=quiet(), model=files[0], data=files[1], batch_size=4, heldout=10, max_length=64, steps=24, threads=1
    )
    assert found.options == [
        o.model_copy(update={"seconds": f.seconds}) for o, f in zip(made.options, found.options, strict=True)
    ]
    with pytest.raises(CTError, match="bugdet"):
        ctsft.make_plan(bugdet="1 min")
