"""The script that checks plans: what it fits, and how it sweeps."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

from ctsft.plan import predict
from ctsft.plan.record import Trial

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_plans", SCRIPTS / "check_plans.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_plans"] = module
    spec.loader.exec_module(module)
    return module


def test_the_constants_of_predictions_come_from_the_records(check):
    found = check.constants()
    used = (predict.GROWTH, predict.BY_SIZE, predict.BY_ROWS, predict.PAIR, predict.ARM, predict.RELATIVE)
    assert found == pytest.approx(used, abs=0.04)  # the laboratory's records grow


def test_nothing_that_is_checked_was_learned_from(check):
    learned = {(pair.split("-")[0], Path(asked["data"]).stem) for pair, (asked, _) in check.FIT.items()}
    checked = {(check.model_of(pair), Path(asked["data"]).stem) for pair, asked in check.PAIRS.items()}
    assert not learned & checked
    assert not {f"{model} {text}" for model, text in checked} & {name.rpartition(" ")[0] for name in check.growths()}


def trial(seed, rate, end):
    return Trial(
        candidate="diagonal-4", seed=seed, rate=rate, steps=2, horizon=2, batch_size=1, train=[5.0, 4.0],
        heldout=[(0, 5.0), (2, end)], clock=[1.0, 2.0], trained=4, adapter_bytes=1, memory_bytes=1, diverged=False,
    )  # fmt: skip


def test_a_sweep_tries_three_rates_grows_at_the_edge_and_judges_the_best(check):
    losses = {0.03: 3.0, 0.1: 4.0, 0.3: 4.5, 0.01: 2.9, 0.1 / 27: 3.5}
    have, order = [], []
    while more := list(check.due("diagonal-4", have, check.WHOLE[0])):
        for seed, rate in more:
            rate = rate or 0.1
            order.append((seed, float(f"{rate:.1g}")))
            near = min(losses, key=lambda r: abs(math.log(r / rate)))
            have.append(trial(seed, rate, losses[near]))
    assert order == [(0, 0.1), (0, 0.03), (0, 0.3), (0, 0.01), (0, 0.004), (1, 0.01), (2, 0.01)]


def test_the_right_k_is_the_smallest_within_a_percent_of_the_drop(check):
    losses = {"diagonal-64": 3.0, "diagonal-16": 3.019, "diagonal-4": 3.5, "gains-64": 2.0}
    assert check.smallest(losses, 5.0) == "diagonal-16"
    assert check.smallest(losses | {"diagonal-16": 3.021}, 5.0) == "diagonal-64"
    assert check.near_64(["diagonal-256", "diagonal-64", "gains-64"]) == "diagonal-64"
    assert check.near_64(["diagonal-4", "diagonal-32", "gains-32"]) == "diagonal-32"


def test_the_page_has_every_row_of_the_check(check):
    page = (SCRIPTS.parent / "docs" / "planning.md").read_text()
    rows = check.table(check.PAIRS)
    assert len(rows) > 3
    for row in rows:
        assert row in page
