"""The folder of a run: one process at a time, what the run was started from, and what a kill leaves."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from command import assert_one_sentence, options
from ctsft.errors import CTError
from ctsft.files import read_json, write_json
from ctsft.tune import folder, measure, trainer
from ctsft.tune import run as train
from ctsft.tune.folder import LOCK, hashed, locked, read_sealed, sweep, write_sealed
from ctsft.tune.record import Sources, read_run
from ctsft.tune.trainer import COMPLETE

# Starts as `ctsft` does, and after the third step (or before the model is loaded) waits to be killed.
WAITING = """
import pathlib, sys, time
from ctsft.cli import main
from ctsft.tune import material, trainer

def wait(*_, **__):
    pathlib.Path(sys.argv[-1] + ".waiting").touch()
    time.sleep(600)

if {early}:
    material.load_model = wait
else:
    original = trainer.Watch.on_step_end
    trainer.SAVE_EVERY = 0
    trainer.Watch.on_step_end = lambda self, args, state, *a, **k: (
        wait() if state.global_step == 3 else original(self, args, state, *a, **k)
    )
main.main()
"""


@pytest.fixture
def at_work(files, tmp_path):
    """Another process with a run in tmp_path/"run", which waits to be killed: `at_work(early)`."""
    started = []

    def start(early):
        args = [sys.executable, "-c", WAITING.format(early=early), "tune", *options(files)]
        process = subprocess.Popen([*args, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True)
        started.append(process)
        deadline = time.monotonic() + 120
        while not (tmp_path / "run.waiting").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def contents(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def numbers(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")["ctsft.coefficients"]


def test_a_second_process_in_the_folder_is_refused_and_a_killed_one_holds_nothing(ctsft, files, tmp_path, at_work):
    first, run = at_work(early=False), tmp_path / "run"
    before = contents(run)
    for more in (["--resume"], [*options(files), "--overwrite"], [*options(files), "--seed", "1"]):
        assert_one_sentence(ctsft("tune", *more, "--out", run), f"another process is at work in {run}")
    assert contents(run) == before
    first.kill()
    first.wait()
    assert (run / LOCK).exists() and ctsft("tune", "--resume", "--out", run)[0] == 0
    assert {p.name for p in run.iterdir()} == {"adapter", "recipe.json", "report.html", "run.json"}
    assert ctsft("tune", *options(files), "--out", tmp_path / "unbroken")[0] == 0
    assert torch.equal(numbers(run), numbers(tmp_path / "unbroken"))


def test_of_two_that_start_at_once_in_a_new_folder_the_second_is_refused(ctsft, files, tmp_path, at_work):
    first, run = at_work(early=True), tmp_path / "run"
    assert_one_sentence(ctsft("tune", *options(files), "--out", run), "another process is at work")
    first.kill()
    first.wait()
    assert ctsft("tune", *options(files), "--out", run)[0] == 0  # what the killed one left is no foreign folder
    assert not list(run.glob(".*"))


def test_the_lock_leaves_nothing(tmp_path):
    with pytest.raises(CTError, match="mistake"), locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
        with pytest.raises(CTError, match="at work"), locked(tmp_path / "a" / "b"):
            pass
        raise CTError("mistake")
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "recipe.json").write_text("{}")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["recipe.json"]


def test_a_folder_that_is_not_ours_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with locked(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


# ---- scratch


def test_scratch_of_killed_runs_is_swept_and_nothing_else(tmp_path):
    mine = [
        ".adapter-notes",
        ".adapter-AAAAAAAA",
        ".run.json-1",
        ".notes-" + "0" * 32,
        ".env",
        "adapter-lora",
        ".lora-abcdefgh",
    ]
    ours = [".adapter-ab1_defg", ".run.json-" + "0f" * 16, ".before.json-" + "0f" * 16, ".report.html-" + "0f" * 16]
    for name in [*mine, *ours]:
        if name.startswith((".adapter", "adapter", ".lora")):
            (tmp_path / name / "new").mkdir(parents=True)
        else:
            (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / (".best.safetensors-" + "0f" * 16)).touch()
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {*mine, "checkpoints"}
    assert not list((tmp_path / "checkpoints").iterdir())


# ---- stopped runs that are resumed in a changed world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(place):
    """A model, rows, a run stopped after the fourth of six steps, with two checkpoints, and the same run unbroken."""
    given = tiny.save_model(place / "llama"), tiny.save_rows(place / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_report", lambda run, path: path.write_text(run.name))
        quiet(given, place / "unbroken")
        patch.setattr(trainer, "SAVE_EVERY", 0)
        patch.setattr(trainer.Watch, "on_step_end", stopping(trainer.Watch.on_step_end))
        with pytest.raises(trainer.Stopped):
            quiet(given, place / "run")
    checkpoints = {p.name for p in (place / "run" / "checkpoints").iterdir()}
    assert checkpoints == {"checkpoint-3", "checkpoint-4", "best.safetensors", "README.md"}
    return place


def stopping(original):
    def on_step_end(self, args, state, control, **rest):
        if state.global_step == 4:
            signal.raise_signal(signal.SIGINT)
        return original(self, args, state, control, **rest)

    return on_step_end


def quiet(given, out, **more):
    few = {"k": 4, "steps": 6, "batch_size": 4, "heldout": 8, "eval_rows": 4, "max_length": 64, "samples": 1}
    recipe = folder.Recipe(model=given[0], data=given[1], max_new_tokens=2, **few)
    heard = io.StringIO()
    return train.tune(recipe, out, console=Console(file=heard, width=1000), **more), heard.getvalue()


@pytest.fixture
def stopped(world, tmp_path, monkeypatch):
    """A copy of the world; returns (resume, its folder)."""
    monkeypatch.setattr(train, "write_report", lambda run, path: path.write_text(run.name))
    shutil.copytree(world, tmp_path / "w")
    here = tmp_path / "w"
    # Model and data are copies too, which a test may change: the run is made to be one that was started from them.
    recipe = read_json(here / "run" / "recipe.json") | {"model": str(here / "llama"), "data": str(here / "rows.jsonl")}
    write_json(here / "run" / "recipe.json", recipe)
    sources = read_sealed(here / "run" / "sources.json", Sources)
    write_sealed(here / "run" / "sources.json", sources.model_copy(update={"recipe": hashed([recipe])}))
    return (lambda: quiet((recipe["model"], recipe["data"]), here / "run", resume=True)), here


def change_row(here):
    lines = (here / "rows.jsonl").read_text().splitlines()
    lines[7] = lines[7].replace("aaaa", "aaab")
    (here / "rows.jsonl").write_text("\n".join(lines) + "\n")


def change_weight(here):
    model = AutoModelForCausalLM.from_pretrained(here / "llama")
    model.model.norm.weight.data[3] += 1e-6
    model.save_pretrained(here / "llama")


def change_tokens(here):
    path = here / "llama" / "tokenizer.json"
    vocabulary = json.loads(path.read_text())
    vocab = vocabulary["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(vocabulary))


def change_recipe(here):
    path = here / "run" / "recipe.json"
    write_json(path, read_json(path) | {"seed": 1})


def flip(path, where=-20):
    raw = bytearray(path.read_bytes())
    raw[where] ^= 1
    path.write_bytes(raw)


CHANGES = {
    "rows": (change_row, r"with other rows in .*rows\.jsonl; put back what changed"),
    "weights": (change_weight, r"with other weights in .*llama; put back"),
    "tokenizer": (change_tokens, r"with other tokens of .*\(the tokenizer"),
    "both": (lambda here: (change_row(here), change_weight(here)), r"other rows in .* and other weights in"),
    "recipe": (change_recipe, r"recipe\.json was changed or damaged since"),
    "sources": (lambda here: flip(here / "run" / "sources.json"), r"sources\.json is damaged, so nobody knows"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_not_resumed_where_what_it_was_started_from_changed(name, stopped):
    resume, here = stopped
    change, words = CHANGES[name]
    change(here)
    before = contents(here)
    with pytest.raises(CTError, match=words) as told:
        resume()
    assert "\n" not in str(told.value) and contents(here) == before


PARTS = [
    "trainer_state.json",
    "scheduler.pt",
    "optimizer.pt",
    "rng_state.pth",
    "adapter_model.safetensors",
    "best.safetensors",
    COMPLETE,
]


@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_checkpoint_of_the_same_size_gives_way_to_the_one_before(part, stopped, world):
    resume, here = stopped
    flip(here / "run" / "checkpoints" / "checkpoint-4" / part)
    assert (here / "run" / "checkpoints" / "checkpoint-4" / part).stat().st_size
    run, heard = resume()
    assert re.search(r"checkpoint-4 is damaged; the run goes on from before it\.\n", heard)
    assert torch.equal(numbers(here / "run"), numbers(world / "unbroken"))
    assert run.after == read_run(world / "unbroken" / "run.json").after


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["before.json"], ["before.json is damaged; the model as it is, is measured again."]),
        (["checkpoints/best.safetensors"], []),  # the checkpoint has its own copy
        (
            ["checkpoints/checkpoint-3/rng_state.pth", "checkpoints/checkpoint-4/optimizer.pt"],
            ["-3 is damaged", "-4 is"],
        ),
    ],
)
def test_other_damage_is_told_and_made_good(names, words, stopped, world):
    resume, here = stopped
    for name in names:
        flip(here / "run" / name)
    run, heard = resume()
    assert all(word in heard for word in words)
    unbroken = read_run(world / "unbroken" / "run.json")
    assert torch.equal(numbers(here / "run"), numbers(world / "unbroken"))
    assert (run.before, run.after, run.samples) == (unbroken.before, unbroken.after, unbroken.samples)


def test_a_run_that_does_not_know_its_sources_says_so_and_goes_on(stopped, world):
    resume, here = stopped
    (here / "run" / "sources.json").unlink()
    _, heard = resume()
    assert "does not tell from which data and weights the run was started" in heard
    assert torch.equal(numbers(here / "run"), numbers(world / "unbroken"))


def test_scratch_is_gone_after_a_resumed_run(stopped):
    resume, here = stopped
    (here / "run" / ".adapter-abcdefgh" / "new").mkdir(parents=True)
    (here / "run" / (".run.json-" + "0" * 32)).touch()
    resume()
    assert {p.name for p in (here / "run").iterdir()} == {"adapter", "recipe.json", "report.html", "run.json"}


def test_checkpoints_are_read_without_unpickling(stopped, tmp_path):
    """A checkpoint that brings code, with an inventory of its own: refused by torch's reader, nothing is run."""
    resume, here = stopped
    folder_ = here / "run" / "checkpoints" / "checkpoint-4"

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save(Code(), folder_ / name)
    (folder_ / COMPLETE).write_text(trainer.inventory(folder_))
    with pytest.raises(CTError, match="checkpoint-4 cannot be read"):
        resume()
    assert not (tmp_path / "ran").exists()


# ---- what fails after the training


def broken(*_, **__):
    raise RuntimeError("no\nluck")


STAGES = {
    "generating": ("writing answers after the training", lambda patch: fail_after(patch, measure, "generate", 1)),
    "spectra": ("reading the spectra", lambda patch: patch.setattr(train, "spectra", broken)),
    "report": ("writing the report", lambda patch: patch.setattr(train, "write_report", broken)),
}


def fail_after(patch, module, name, times):
    original, calls = getattr(module, name), []

    def function(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) if len(calls) <= times else broken()

    patch.setattr(module, name, function)


@pytest.mark.parametrize("name", STAGES)
def test_what_fails_after_the_training_costs_neither_adapter_nor_record(name, world, tmp_path, monkeypatch):
    what, fail = STAGES[name]
    monkeypatch.setattr(train, "write_report", lambda run, path: path.write_text(run.name))
    fail(monkeypatch)
    _, heard = quiet((str(world / "llama"), str(world / "rows.jsonl")), tmp_path / "run")
    sentence = f"{what} failed (RuntimeError: no luck); all else of the run is there."
    assert sentence + "\n" in heard
    run, unbroken = (read_run(out / "run.json") for out in (tmp_path / "run", world / "unbroken"))
    assert run.problems == [sentence] and unbroken.problems == []
    assert run.after == unbroken.after and torch.equal(numbers(tmp_path / "run"), numbers(world / "unbroken"))
    assert (run.samples == []) is (name == "generating") and (run.spectra == []) is (name == "spectra")
    assert (tmp_path / "run" / "report.html").exists() is (name != "report")


def test_where_the_loss_cannot_be_measured_the_adapter_is_written_and_the_rest_can_be_tried_again(
    world, tmp_path, monkeypatch
):
    given = str(world / "llama"), str(world / "rows.jsonl")
    monkeypatch.setattr(train, "write_report", lambda run, path: path.write_text(run.name))
    with monkeypatch.context() as patch:
        fail_after(patch, measure, "heldout_loss", 1)
        with pytest.raises(CTError, match=r"failed \(RuntimeError: no luck\); .*adapter holds the adapter") as told:
            quiet(given, tmp_path / "run")
    assert "\n" not in str(told.value)
    assert torch.equal(numbers(tmp_path / "run"), numbers(world / "unbroken"))
    quiet(given, tmp_path / "run", resume=True)
    assert torch.equal(numbers(tmp_path / "run"), numbers(world / "unbroken"))


@pytest.mark.parametrize("basis", ["weight", "random"])
def test_a_matrix_of_zeros_is_no_loss(basis, tmp_path, monkeypatch):
    """Its spectrum is zero; how far it moved in shares of itself is 0 or unknown, and the report is whole."""
    model = AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "llama"))
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "llama")
    recipe = folder.Recipe(
        model=str(tmp_path / "llama"),
        data=tiny.save_rows(tmp_path / "rows.jsonl"),
        **{
            "k": 4,
            "steps": 3,
            "batch_size": 4,
            "heldout": 8,
            "eval_rows": 4,
            "max_length": 64,
            "basis": basis,
            "lr": 0.1,
        },
    )
    train.tune(recipe, tmp_path / "run", console=Console(file=io.StringIO()))
    run = read_run(tmp_path / "run" / "run.json")
    assert run.problems == [] and len(run.spectra) == 14
    (zero,) = [row for row in run.spectra if row.name == "model.layers.1.mlp.down_proj"]
    assert (zero.effective_rank, zero.stable_rank, zero.energy_top_k, zero.largest) == (0, 0, 0, 0)
    assert zero.coefficient_norm > 0 and zero.delta_over_weight is None
    assert all(row.delta_over_weight > 0 for row in run.spectra if row is not zero)
    assert "model.layers.1.mlp.down_proj" in (tmp_path / "run" / "report.html").read_text()
