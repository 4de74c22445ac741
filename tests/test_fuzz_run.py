"""Damaged files of a run: resumed to the same bits, or one sentence; a damaged record is a page, or one sentence."""

import copy
import io
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ctsft.errors import CTError
from ctsft.files import read_json
from ctsft.tune import run as train
from ctsft.tune.recipe import read_recipe
from ctsft.tune.record import read_run
from ctsft.tune.report import write_report
from fuzz import TOKENS, budget, changed, outcome, seeds
from test_folder import make_world, numbers
from test_report import RUN

MORE = (*TOKENS, b"true", b'"k": 5,', b'"hash": "x",', b"9" * 5_000, b"[" * 5_000, b"1e308", b"\\u202e", b"[/red]")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A stopped run, its files, and what it comes to unbroken: numbers, scores before and after."""
    place = make_world(tmp_path_factory.mktemp("fuzz"))
    run = read_run(place / "unbroken" / "run.json")
    names = sorted(str(p.relative_to(place / "run")) for p in (place / "run").rglob("*") if p.is_file())
    assert {"recipe.json", "before.json", "sources.json", "checkpoints/checkpoint-4/optimizer.pt"} < {*names}
    return place, names, numbers(place / "unbroken"), (run.before, run.after, run.samples)


def resumed(out):
    """As `ctsft tune --resume` does it."""
    return train.tune(read_recipe(out / "recipe.json"), out, resume=True, console=Console(file=io.StringIO()))


@budget(12)
@given(seed=seeds(), data=st.data())
def test_a_damaged_run_is_resumed_to_the_same_bits_or_refused_in_one_sentence(stopped, seed, data):
    place, names, wanted, scores = stopped
    out = place / "damaged"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(place / "run", out)
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        (out / name).write_bytes(changed((out / name).read_bytes(), seed, MORE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_report", lambda run, path: path.write_text(run.name))
        run = outcome(lambda: resumed(out), seconds=120)
    if isinstance(run, CTError):
        assert (out / "recipe.json").exists() and not (out / "run.json").exists()
    else:
        assert torch.equal(numbers(out), wanted) and (run.before, run.after, run.samples) == scores
        assert run.problems == [] and read_run(out / "run.json") == run


@budget(60)
@given(seed=seeds())
def test_a_damaged_record_is_one_sentence_or_a_page(tmp_path_factory, seed):
    path = tmp_path_factory.getbasetemp() / "fuzz-run.json"
    path.write_bytes(changed(json.dumps(RUN, indent=1).encode(), seed, MORE))
    page(path)


def page(path):
    """The record in `path` as a page beside it, or a CTError."""
    run = outcome(lambda: read_run(path))
    if not isinstance(run, CTError):
        outcome(lambda: write_report(run, path.with_suffix(".html")), seconds=60)
        assert path.with_suffix(".html").read_text(encoding="utf-8").count("<html") == 1
        outcome(lambda: str(run.warning + run.history))
    return run


def leaves(value, place=()):
    """The place of every value in a JSON value."""
    yield place
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*place, key))


ODD = [None, True, -1, 0, 10**30, 1e308, -1e308, 5e-324, 0.5, "", "x", "[/red]\u202e\ud800", [], {}, [0], {"a": 1}]


@budget(40)
@given(data=st.data())
def test_odd_values_in_a_record_are_one_sentence_or_a_page(tmp_path_factory, data):
    values = copy.deepcopy(RUN)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from([place for place in leaves(values) if place]))
        holder = values
        for key in way:
            holder = holder[key]
        holder[last] = data.draw(st.sampled_from(ODD))
    path = tmp_path_factory.getbasetemp() / "fuzz-odd.json"
    path.write_text(json.dumps(values))
    page(path)


@budget(100)
@given(seed=seeds(), data=st.data())
def test_odd_values_in_a_recipe_are_one_sentence_or_a_recipe(stopped, tmp_path_factory, seed, data):
    values = read_json(stopped[0] / "run" / "recipe.json")
    name = data.draw(st.sampled_from([*values, "self", "__dataclass_self__", "a\nb" * 400]))
    values[name] = data.draw(st.sampled_from([*ODD, "9" * 5_000, 10**12, {"(": 4}, {"(.+)+!": 4}, {"": 0}, [1, "a"]]))
    path = tmp_path_factory.getbasetemp() / "fuzz-recipe.json"
    path.write_bytes(json.dumps(values).encode())
    recipe = outcome(lambda: read_recipe(path))
    assert isinstance(recipe, CTError) or read_recipe(path) == recipe
