"""The script that checks plans: what it fits, and how it sweeps."""

import importlib.util
import math
import random
import sys
from pathlib import Path

import pytest

from ctsft.plan import predict
from ctsft.plan.budget import parse_budget
from ctsft.plan.record import Trial

SCRIPTS = Path(__file__).parents[1] / "scripts"


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check():
    return loaded("check_plans")


@pytest.fixture(scope="module")
def judge(check):
    return loaded("judge_plans")  # which imports the other


def test_the_constants_of_predictions_come_from_the_records(check):
    found = check.constants()
    used = (predict.GROWTH, predict.BY_SIZE, predict.BY_ROWS, predict.PAIR, predict.ARM, predict.RELATIVE)
    assert found == pytest.approx(used, abs=0.04)  # the laboratory's records grow


def test_nothing_that_new_pairs_are_checked_on_was_learned_from(check):
    learned = {(pair.split("-")[0], Path(asked["data"]).stem) for pair, (asked, _) in check.FIT.items()}
    checked = {(check.model_of(pair), Path(asked["data"]).stem) for pair, asked in check.PAIRS.items()}
    assert not learned & checked
    assert not {f"{model} {text}" for model, text in checked} & {name.rpartition(" ")[0] for name in check.growths()}
    new = {(check.model_of(p), check.PAIRS[p]["data"]) for p in check.PAIRS if p not in check.EARLIER}
    assert not new & {(check.model_of(p), asked["data"]) for p, asked in check.EARLIER.items()}
    assert not set(check.growths()) & (set(check.PAIRS) - set(check.EARLIER))


def test_an_interval_that_holds_counts_pairs_and_leaves_room_for_the_next(check):
    assert check.conformal([[float(i)] for i in range(1, 10)]) == 9  # of nine pairs the worst, at 90%
    assert check.conformal([[float(i)] for i in range(1, 9)]) == math.inf  # eight are too few
    assert check.conformal([[float(i)] for i in range(1, 20)]) == 18
    many = [[1.0] * 100, [5.0], *([2.0] for _ in range(18))]
    assert check.conformal(many) == 2  # a pair of many arms counts once
    rng = random.Random(0)
    held = 0
    for _ in range(2000):  # pairs of which all arms miss alike
        groups = [[abs(pair + rng.gauss(0, 0.3)) for _ in range(5)] for pair in (rng.gauss(0, 1) for _ in range(13))]
        held += groups[-1][0] <= check.conformal(groups[:-1])
    assert 0.89 < held / 2000 < 0.96


def trial(seed, rate, end):
    return Trial(
        candidate="diagonal-4", seed=seed, rate=rate, steps=2, horizon=2, batch_size=1, train=[5.0, 4.0],
        heldout=[(0, 5.0), (2, end)], clock=[1.0, 2.0], trained=4, adapter_bytes=1, memory_bytes=1, diverged=False,
    )  # fmt: skip


def test_a_sweep_tries_three_rates_grows_at_the_edge_and_judges_the_best(check):
    losses = {0.03: 3.0, 0.1: 4.0, 0.3: 4.5, 0.01: 2.9, 0.1 / 27: 3.5}
    have, order = [], []
    while more := list(check.due("diagonal-4", have, check.TWICE[0])):
        for seed, rate in more:
            rate = rate or 0.1
            order.append((seed, float(f"{rate:.1g}")))
            near = min(losses, key=lambda r: abs(math.log(r / rate)))
            have.append(trial(seed, rate, losses[near]))
    assert order == [(0, 0.1), (0, 0.03), (0, 0.3), (0, 0.01), (0, 0.004), (1, 0.01), (2, 0.01)]


def test_the_right_k_is_the_smallest_within_a_percent_of_the_drop(judge):
    losses = {"diagonal-64": 3.0, "diagonal-16": 3.019, "diagonal-4": 3.5, "gains-64": 2.0}
    assert judge.smallest(losses, 5.0) == "diagonal-16"
    assert judge.smallest(losses | {"diagonal-16": 3.021}, 5.0) == "diagonal-64"
    assert judge.near_64(["diagonal-256", "diagonal-64", "gains-64"]) == "diagonal-64"
    assert judge.near_64(["diagonal-4", "diagonal-32", "gains-32"]) == "diagonal-32"


def test_rules_of_thumb_take_the_nearest_k(judge):
    loaded("study_plans")
    rules = loaded("study_rules")
    found = {"options": dict.fromkeys(["diagonal-4", "diagonal-16", "diagonal-64", "gains-64"])}
    found |= {"ends": {"diagonal-4": 4.0, "diagonal-16": 3.0, "diagonal-64": 2.995, "gains-64": 2.0}, "start": 5.0}
    taken = [rules.nearest(found, k) for k in (1, 7, 8, 33, 10**6)]
    assert taken == ["diagonal-4", "diagonal-4", "diagonal-16", "diagonal-64", "diagonal-64"]
    assert rules.right(found) == 16  # within 1% of the drop of 64
    assert judge.regret(found["ends"], 5.0, "diagonal-16") == pytest.approx(1 / 3)
    assert [rules.by_rows(n) for n in (999, 1_000, 99_999, 100_000)] == [8, 16, 32, 64]
    assert rules.row("a", [0.0, 0.02], [1.0, -2.0]) == "| a | 1.0% | 2% | 1 of 2 | 1 of 2 |"


def test_a_budget_counts_where_it_leaves_out_some_and_leaves_a_choice(judge):
    pair = "stories15m-melville"  # of 168, 672, 2,688, 10,752 and 20,544 numbers
    assert judge.under(pair, parse_budget("200 numbers")) is None is judge.under(pair, parse_budget("30000 numbers"))
    plan, most, usual = judge.under(pair, parse_budget("20000 numbers"))
    ends, start = judge.ends_of(pair), judge.judged(pair)["start"]
    assert plan == most == 0 and usual == pytest.approx(
        (ends["diagonal-64"] - ends["diagonal-256"]) / (start - ends["diagonal-256"])
    )


def test_the_page_has_every_row_of_the_check(judge):
    page = (SCRIPTS.parent / "docs" / "planning.md").read_text()
    rows = [row for part in judge.parts() for row in part] + loaded("study_rules").table()
    assert len(rows) > 30
    for row in rows:
        assert row in page
