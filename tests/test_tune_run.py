import io
import itertools
import json
import math
import re
import shutil
import signal

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file

import tiny
from ctsft import progress
from ctsft.adapter import store
from ctsft.data.rows import load_corpus
from ctsft.data.tokens import format_rows
from ctsft.errors import CTError
from ctsft.files import read_json, versions, write_json
from ctsft.tune import folder, trainer
from ctsft.tune import run as train
from ctsft.tune.recipe import make_recipe
from ctsft.tune.record import Scores, read_run
from ctsft.tune.run import tune
from ctsft.tune.trainer import Stopped, last_checkpoint
from helpers import coefficients, owners, randomise, slow_loss

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.save_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def recipe(model, data):
    small = {"k": 4, "steps": STEPS, "batch_size": 4, "heldout": 8, "eval_rows": 8, "max_length": 64}
    show = {"samples": 2, "max_new_tokens": 4, "calibration_rows": 4}
    return lambda **changes: make_recipe({"model": model, "data": data} | small | show | changes)


def quiet(recipe, out, **options):
    return tune(recipe, out, console=Console(file=io.StringIO()), **options).values()


def numbers(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def curve(run):
    return [(e["step"], e["loss"], e["learning_rate"], e["tokens"]) for e in run["curve"]]


def assert_same_run(out, run, unbroken, expected):
    """Same trained numbers, bit for bit, same losses on the way, same measures; nothing left of the interruption."""
    found, wanted = numbers(out), numbers(unbroken)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in found)
    assert curve(run) == curve(expected)
    for part in ("before", "after", "samples", "spectra", "fingerprint"):
        assert run[part] == expected[part], part
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == FILES


FILES = {"adapter", "recipe.json", "report.html", "run.json"}


# ---- a whole run


@pytest.fixture(scope="module")
def unbroken(recipe, tmp_path_factory):
    """A finished run that nothing has disturbed, and its record."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, quiet(recipe(), out)


def test_a_run_leaves_its_files(unbroken, recipe):
    out, run = unbroken
    assert {p.name for p in out.iterdir()} == FILES
    assert read_json(out / "run.json") == json.loads(json.dumps(run))
    assert read_json(out / "recipe.json") == recipe().values()
    assert run["name"] in (out / "report.html").read_text()


def test_record_has_just_these_fields(unbroken, model):
    _, run = unbroken
    assert list(run) == [
        *("format", "name", "created", "recipe", "versions", "machine", "model", "data", "fingerprint", "costs"),
        *("before", "after", "curve", "spectra", "samples", "steps", "resumed"),
    ]
    assert run["name"] == "llama on rows.jsonl, diagonal K=4, random basis"
    assert run["format"] == 1 and run["steps"] == STEPS and run["resumed"] is False
    assert run["versions"] == versions()
    assert set(run["machine"]) == {"platform", "cpu", "threads", "device"}
    assert run["model"] == {"name": "llama", "parameters": 34_080, "dtype": "float32", "note": ""}
    assert run["data"] == {
        "name": "rows.jsonl",
        "kind": "prompt_completion",
        "train_rows": 32,
        "heldout_rows": 8,
        "truncated": 0,
        "dropped": 0,
        "notes": run["data"]["notes"],
    }
    assert set(run["before"]) == set(run["after"]) == {"heldout_loss", "heldout_tokens", "accuracy"}
    assert run["before"]["accuracy"] is None
    assert [set(e) for e in run["curve"]] == [{"step", "loss", "learning_rate", "seconds", "tokens"}] * STEPS
    assert [e["step"] for e in run["curve"]] == list(range(1, STEPS + 1))
    assert all(a["tokens"] < b["tokens"] and a["seconds"] < b["seconds"] for a, b in itertools.pairwise(run["curve"]))
    row = {"name", "shape", "k", "effective_rank", "stable_rank", "energy_top_k", "largest"}
    assert all(set(r) == row | {"coefficient_norm", "delta_over_weight"} for r in run["spectra"])
    assert len(run["spectra"]) == 14 and all(r["k"] == 4 for r in run["spectra"])
    sample = {"prompt", "reference", "before", "after", "before_ok", "after_ok"}
    assert [set(s) for s in run["samples"]] == [sample] * 2
    assert {s["reference"] for s in run["samples"]} == {" aaaa"}


def test_costs_are_those_of_the_real_things(unbroken, recipe, tmp_path, monkeypatch):
    out, run = unbroken
    folder = out / "adapter"
    written = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    assert run["costs"]["adapter_bytes"] == sum(p.stat().st_size for p in written)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
    assert run["costs"]["trainable"] == sum(p.numel() for p in loaded.parameters() if p.requires_grad) == 14 * 4
    assert run["costs"]["trainable"] == numbers(out)["ctsft.coefficients"].numel()
    assert run["costs"]["seconds"] == run["curve"][-1]["seconds"]
    # float32: both sides of 14 bases; the numbers, their gradients, Adam's two moments and its step
    sides = {(32, 32): 8, (48, 32): 4, (32, 48): 2}
    bases = 4 * 4 * sum((a + b) * n for (a, b), n in sides.items())
    assert run["costs"]["extra_memory_bytes"] == bases + 4 * (4 * 56 + 14)
    assert run["fingerprint"] == read_json(folder / "adapter_config.json")["fingerprint"]


def test_the_file_takes_two_bytes_a_number_and_is_what_was_scored(unbroken, recipe, tmp_path):
    exact = quiet(recipe(save_dtype="float32"), tmp_path / "exact")
    out, run = unbroken
    size = (out / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size <= 2 * run["costs"]["trainable"] + 2048
    rounded, full = (numbers(o)["ctsft.coefficients"] for o in (out, tmp_path / "exact"))
    assert (rounded.dtype, full.dtype) == (torch.float16, torch.float32)
    assert torch.equal(rounded, full.half()) and not torch.equal(rounded.float(), full)
    norms = [sum(r["coefficient_norm"] ** 2 for r in x["spectra"]) for x in (run, exact)]
    assert norms[0] == pytest.approx(float(rounded.double().square().sum()), rel=1e-6)
    assert norms[1] == pytest.approx(float(full.double().square().sum()), rel=1e-6)


def test_a_shared_basis_costs_memory_once(recipe, tmp_path):
    run = quiet(recipe(form="scores", basis="universal", steps=1), tmp_path / "run")
    trained = 4 * (8 * 32 + 4 * 48 + 2 * 48)
    assert run["costs"]["trainable"] == trained
    assert run["costs"]["extra_memory_bytes"] == 4 * 4 * 32 + 4 * (4 * trained + 14)


def test_loss_and_spectra_tell_what_the_adapter_does(unbroken, data):
    out, run = unbroken
    loaded = AutoPeftModelForCausalLM.from_pretrained(out / "adapter").eval()
    tokenizer = tiny.byte_tokenizer()
    held = load_corpus(data, seed=0, heldout=8).heldout
    rows = list(format_rows(held, tokenizer, "prompt_completion", 64)[0])
    total, count = slow_loss(loaded, rows)
    assert count == run["after"]["heldout_tokens"] == 8 * 6  # " aaaa" and the end of text
    assert run["after"]["heldout_loss"] == pytest.approx(total / count, rel=1e-5)
    with loaded.disable_adapter():
        assert run["before"]["heldout_loss"] == pytest.approx(slow_loss(loaded, rows)[0] / count, rel=1e-5)
    for row in run["spectra"]:
        layer = loaded.get_base_model().get_submodule(row["name"])
        w, delta = layer.base_layer.weight.detach(), layer.get_delta_weight("default").detach()
        assert row["shape"] == list(w.shape)
        assert row["delta_over_weight"] == pytest.approx(float(delta.norm() / w.norm()), rel=1e-4)
        assert row["coefficient_norm"] == pytest.approx(float(delta.norm()), rel=1e-4)  # the directions are orthonormal


def test_the_training_loss_is_that_of_completions_only(recipe, data, unbroken, tmp_path):
    run = quiet(recipe(batch_size=32, steps=1), tmp_path / "run")
    base = AutoPeftModelForCausalLM.from_pretrained(unbroken[0] / "adapter").unload().eval()
    rows = format_rows(load_corpus(data, seed=0, heldout=8).train, tiny.byte_tokenizer(), "prompt_completion", 64)[0]
    total, count = slow_loss(base, list(rows))
    assert count == 32 * 6
    assert run["curve"][0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert run["after"]["heldout_loss"] < run["before"]["heldout_loss"]  # the only step is not lost on warm-up


def test_what_is_easy_is_learnt(recipe, tmp_path):
    run = quiet(recipe(form="core", k=16, steps=40, lr=0.05, batch_size=8), tmp_path / "run")
    assert run["before"]["heldout_loss"] > 5
    assert run["after"]["heldout_loss"] < 0.5
    assert [s["after"] for s in run["samples"]] == ["aaa"] * 2  # a blank and three letters are 4 tokens


def test_sql_is_scored_by_running_it(recipe, model, tmp_path):
    wide = tiny.save_model(tmp_path / "wide", context=1024)
    small = {"heldout": 6, "eval_rows": 4, "limit": 8, "steps": 2, "max_length": 1024, "max_new_tokens": 3}
    run = quiet(recipe(model=wide, data="sql", **small), tmp_path / "run")
    for when in ("before", "after"):
        accuracy = run[when]["accuracy"]
        assert (accuracy["correct"], accuracy["total"]) == (0, 4)
        assert (accuracy["low"], accuracy["high"]) == pytest.approx((0, 0.49), abs=0.01)
        assert sum(total for _, total in accuracy["by_kind"].values()) == 4
    assert [(s["before_ok"], s["after_ok"]) for s in run["samples"]] == [(False, False)] * 2
    assert all("SELECT" in s["reference"] for s in run["samples"])


def test_photonic_on_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join("the quick brown fox " * 20 for _ in range(20)))
    few = {"k": 8, "steps": 1, "batch_size": 2, "heldout": 1, "eval_rows": 1, "samples": 1, "max_new_tokens": 2}
    chosen = make_recipe({"model": "photonic", "data": str(tmp_path / "a.txt"), "max_length": 32} | few)
    run = quiet(chosen, tmp_path / "run")
    assert "laboratory model" in run["model"]["note"]
    assert run["data"]["kind"] == "text"
    assert run["after"]["heldout_loss"] < run["before"]["heldout_loss"]


# ---- stopped, killed and resumed


def at_step(monkeypatch, step, action):
    """Do `action` at the end of step `step`."""
    original = trainer.Watch.on_step_end

    def on_step_end(self, args, state, control, **rest):
        if state.global_step == step:
            action()
        return original(self, args, state, control, **rest)

    monkeypatch.setattr(trainer.Watch, "on_step_end", on_step_end)


@pytest.fixture
def plain_report(monkeypatch):
    """The plots take longer than the training."""
    monkeypatch.setattr(train, "write_report", lambda run, path: path.write_text(run.name))


def die(*_, **__):
    raise SystemExit("killed")


SETTINGS = {
    "dropout": {"amplitude_dropout": 0.3},
    "random": {"basis": "random"},
    "gradient": {"basis": "gradient", "form": "core"},
    "universal": {"basis": "universal"},
    "scores": {"basis": "universal", "form": "scores"},
    "replace": {"basis": "universal", "form": "scores", "universal_mode": "replace", "amplitude_dropout": 0.2},
    "epochs": {"limit": 10, "steps": 8},  # the data is seen more than once
}


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize("name", SETTINGS)
def test_ctrl_c_then_resume_is_as_if_nothing_had_happened(name, recipe, tmp_path, monkeypatch):
    chosen = recipe(**SETTINGS[name])
    expected = quiet(chosen, tmp_path / "unbroken")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped, match="stopped after step 3"):
            quiet(chosen, tmp_path / "run")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert last_checkpoint(tmp_path / "run" / "checkpoints").name == "checkpoint-3"
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped after step 5"):
            quiet(chosen, tmp_path / "run", resume=True)
    run = quiet(chosen, tmp_path / "run", resume=True)
    assert run["resumed"]
    assert_same_run(tmp_path / "run", run, tmp_path / "unbroken", expected)


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize("last", ["SIGINT at the last step", "second SIGINT"])
def test_ctrl_c_at_odd_moments(last, unbroken, recipe, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        if last == "second SIGINT":
            at_step(patch, 3, twice)
        else:
            at_step(patch, STEPS, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            quiet(recipe(), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    assert_same_run(tmp_path / "run", quiet(recipe(), tmp_path / "run", resume=True), *unbroken)


def kill_while_measuring(patch, time):
    original, calls = train.measure, []

    def measure(*args):
        calls.append(args)
        return die() if len(calls) == time else original(*args)

    patch.setattr(train, "measure", measure)


def kill_while_writing(patch, name):
    for module in (train, folder):
        patch.setattr(module, "write_json", lambda path, value: die() if path.name == name else write_json(path, value))


def kill_in_a_checkpoint(patch):
    """Between the writing of a checkpoint's files and that of its mark."""
    original = trainer.inventory
    patch.setattr(trainer, "inventory", lambda folder: die() if folder.name == "checkpoint-4" else original(folder))


MOMENTS = {
    "measuring before": lambda patch: kill_while_measuring(patch, 1),
    "writing before.json": lambda patch: kill_while_writing(patch, "before.json"),
    "starting to train": lambda patch: patch.setattr(train, "fit", die),
    "first step": lambda patch: at_step(patch, 1, die),
    "later step": lambda patch: at_step(patch, 5, die),
    "writing a checkpoint": kill_in_a_checkpoint,
    "last step": lambda patch: at_step(patch, STEPS, die),
    "training done": lambda patch: patch.setattr(train, "extra_memory", die),
    "writing the adapter": lambda patch: patch.setattr(store, "replace_folder", die),
    "measuring after": lambda patch: kill_while_measuring(patch, 2),
    "writing the report": lambda patch: patch.setattr(train, "write_report", die),
    "writing run.json": lambda patch: kill_while_writing(patch, "run.json"),
}


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_then_resumed(moment, unbroken, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0)
    with monkeypatch.context() as patch:
        MOMENTS[moment](patch)
        with pytest.raises(SystemExit, match="killed"):
            quiet(recipe(), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    run = quiet(recipe(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", run, *unbroken)


def test_killed_after_run_json_is_finished(unbroken, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        original = shutil.rmtree
        patch.setattr(
            shutil,
            "rmtree",
            lambda path, *a, **k: die() if str(path).endswith("checkpoints") else original(path, *a, **k),
        )
        with pytest.raises(SystemExit):
            quiet(recipe(), tmp_path / "run")
    assert read_json(tmp_path / "run" / "run.json")["after"] == unbroken[1]["after"]
    with pytest.raises(CTError, match="is finished"):
        quiet(recipe(), tmp_path / "run", resume=True)


def test_resume_uses_the_checkpoint(recipe, tmp_path, monkeypatch):
    """The steps before it are not trained again, and the model as it was is not measured again."""
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped):
            quiet(recipe(), tmp_path / "run")
    steps = []
    original = trainer.CTTrainer.compute_loss
    monkeypatch.setattr(trainer.CTTrainer, "compute_loss", lambda *a, **k: (steps.append(1), original(*a, **k))[1])
    measured = []
    measure = train.measure
    monkeypatch.setattr(train, "measure", lambda *a: (measured.append(len(steps)), measure(*a))[1])
    quiet(recipe(), tmp_path / "run", resume=True)
    assert len(steps) == STEPS - 4
    assert measured == [STEPS - 4]


# ---- a run that ends worse than it began


@pytest.fixture
def spoilt(monkeypatch):
    """All goes well until step 18; then the trained numbers become the opposite of what was learnt."""
    original = trainer.Watch.on_step_end

    def on_step_end(self, args, state, control, **rest):
        if state.global_step == 18:
            for c in coefficients(rest["model"]).values():
                c.data *= -1
        return original(self, args, state, control, **rest)

    monkeypatch.setattr(trainer.Watch, "on_step_end", on_step_end)


TWENTY = {"form": "core", "k": 16, "steps": 20, "lr": 0.02}


@pytest.mark.usefixtures("plain_report", "spoilt")
def test_it_keeps_the_best_state_it_saw_and_says_so(recipe, data, tmp_path):
    run = tune(recipe(**TWENTY), tmp_path / "run", console=Console(file=io.StringIO()))
    assert run.worse.kept_step == 16
    assert run.after.heldout_loss < run.before.heldout_loss < run.worse.end.heldout_loss
    assert read_run(tmp_path / "run" / "run.json") == run
    assert "ended worse than it began" in run.warning and "is that of step 16" in run.warning
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    held = load_corpus(data, seed=0, heldout=8).heldout
    total, count = slow_loss(loaded, list(format_rows(held, tiny.byte_tokenizer(), "prompt_completion", 64)[0]))
    assert run.after.heldout_loss == pytest.approx(total / count, rel=1e-5)
    norms = {s.name: s.coefficient_norm for s in run.spectra}
    for name, layer in owners(loaded).items():
        assert norms[name] == pytest.approx(float(layer.ctsft_coefficients["default"].detach().norm()), rel=1e-4)


@pytest.mark.usefixtures("plain_report", "spoilt")
@pytest.mark.parametrize("step", [9, 17, 19])
def test_it_is_the_same_after_a_stop(step, recipe, tmp_path, monkeypatch):
    expected = quiet(recipe(**TWENTY), tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped):
            quiet(recipe(**TWENTY), tmp_path / "run")
    run = quiet(recipe(**TWENTY), tmp_path / "run", resume=True)
    assert run["worse"] == expected["worse"]
    assert_same_run(tmp_path / "run", run, tmp_path / "unbroken", expected)


@pytest.mark.usefixtures("plain_report")
def test_where_nothing_was_better_than_the_start_the_adapter_changes_nothing(recipe, tmp_path):
    run = quiet(recipe(steps=4, lr=3000.0), tmp_path / "run")
    assert run["worse"]["kept_step"] == 0 and run["worse"]["end"]["heldout_loss"] > run["before"]["heldout_loss"] + 0.5
    assert run["after"] == run["before"]
    assert not numbers(tmp_path / "run")["ctsft.coefficients"].any()
    assert [s["before"] for s in run["samples"]] == [s["after"] for s in run["samples"]]


@pytest.mark.usefixtures("plain_report")
def test_a_few_rows_that_mislead_do_not_make_it_worse_than_the_start(recipe, tmp_path, monkeypatch):
    """The look at few rows favours a bad state; the whole held-out split then tells."""
    monkeypatch.setattr(trainer, "heldout_loss", lambda model, *_: (-float(randomise(model) is model), 1))
    run = quiet(recipe(steps=4, lr=300.0), tmp_path / "run")
    assert run["worse"]["kept_step"] == 0 and run["after"] == run["before"]


# ---- a run that steps back


@pytest.mark.usefixtures("plain_report")
def test_a_loss_that_is_not_finite_costs_no_adapter(recipe, tmp_path):
    """It says so, and the numbers that are kept are those of the best state."""
    told = io.StringIO()
    run = tune(recipe(lr=1e30), tmp_path / "run", console=Console(file=told))
    assert (run.setbacks[0].why, run.setbacks[0].back_to) == ("not finite", 0)
    assert run.setbacks[0].told() in told.getvalue().replace("\n", " ")
    assert run.after == run.before and run.worse.kept_step == 0 and run.worse.end is None
    assert "rose from" in run.warning and "to a number that is not finite" in run.warning
    assert not numbers(tmp_path / "run")["ctsft.coefficients"].any()
    assert all(math.isfinite(point.loss) for point in run.curve) and len(run.curve) == STEPS
    assert read_run(tmp_path / "run" / "run.json") == run


@pytest.fixture
def wary(monkeypatch):
    """Looks on the way take every move for a loss above the start's."""

    def size(model, *_):
        return float(torch.cat([c.detach().flatten() for c in coefficients(model).values()]).norm()), 1

    monkeypatch.setattr(trainer, "heldout_loss", size)


FORTY = {"steps": 40, "lr": 0.02}


@pytest.mark.usefixtures("plain_report", "wary")
def test_a_loss_above_its_start_for_long_lowers_the_rate(recipe, tmp_path):
    run = tune(recipe(**FORTY), tmp_path / "run", console=Console(file=io.StringIO()))
    assert [(back.step, back.back_to, back.why) for back in run.setbacks] == [
        (16, 0, "above its start"),
        (32, 0, "above its start"),
    ]
    assert [back.peak for back in run.setbacks] == pytest.approx([0.005, 0.00125])
    rates = [
        point.learning_rate / (1 - (point.step - 3) / 38) for point in run.curve[2:]
    ]  # of the rest of the schedule
    assert rates[:14] == pytest.approx([0.02] * 14) and rates[14:30] == pytest.approx([0.005] * 16)
    assert rates[30:] == pytest.approx([0.00125] * 8)
    assert run.after.heldout_loss < run.before.heldout_loss and not run.warning


@pytest.mark.usefixtures("plain_report", "wary")
@pytest.mark.parametrize("step", [12, 16, 17])
@pytest.mark.parametrize("changes", [FORTY, {"lr": 1e30, "steps": 20}], ids=["above", "not finite"])
def test_it_steps_back_to_the_same_bits_after_a_stop(step, changes, recipe, tmp_path, monkeypatch):
    expected = quiet(recipe(**changes), tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped):
            quiet(recipe(**changes), tmp_path / "run")
    run = quiet(recipe(**changes), tmp_path / "run", resume=True)
    assert run["setbacks"] == expected["setbacks"] and run["setbacks"]
    assert_same_run(tmp_path / "run", run, tmp_path / "unbroken", expected)


def test_a_batch_that_has_no_loss_at_all_is_one_sentence(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "summed_loss", lambda *_: (torch.tensor(math.nan), torch.tensor(1)))
    with pytest.raises(CTError, match=r"rows of step 1 is nan at the best state too; use dtype float32"):
        quiet(recipe(), tmp_path / "run")


def test_the_smallest_rise_that_is_shown_counts():
    def scores(loss):
        return Scores(heldout_loss=loss, heldout_tokens=1, accuracy=None)

    assert train.rose(scores(1.15), scores(1.151)) and not train.rose(scores(1.15), scores(1.1504))
    assert not train.rose(scores(1.15), scores(1.1))


# ---- the folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def stopped(recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped):
            quiet(recipe(), tmp_path / "run")
    return tmp_path / "run"


def test_refusals_name_the_way_out_and_touch_nothing(stopped, unbroken, recipe, tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / "checkpoints").mkdir(parents=True)
    (foreign / "recipe.json").write_text('{"pie": "apple"}')
    (foreign / "checkpoints" / "mine").write_text("precious")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = contents(tmp_path)
    for out, options, changes, words in [
        (stopped, {"resume": True}, {"steps": 9, "lr": 0.5}, r"other steps, lr; resume it without"),
        (stopped, {}, {}, r"unfinished; continue it with --resume, replace it with --overwrite"),
        (unbroken[0], {}, {}, r"finished; replace it with --overwrite"),
        (unbroken[0], {"resume": True}, {}, r"is finished; its report is .*report\.html"),
        (tmp_path / "nowhere", {"resume": True}, {}, r"no run to resume; start one without"),
        (tmp_path / "papers", {"resume": True}, {}, r"no run to resume"),
        (tmp_path / "papers", {}, {}, r"is no run of ctsft"),
        (tmp_path / "papers", {"overwrite": True}, {}, r"is no run of ctsft"),
        (tmp_path / "file", {"overwrite": True}, {}, r"is no run of ctsft"),
        (foreign, {"overwrite": True}, {}, r"recipe\.json is not from this ctsft"),
        (foreign, {"resume": True}, {}, r"recipe\.json is not from this ctsft"),
    ]:
        with pytest.raises(CTError, match=words):
            quiet(recipe(**changes), out, **options)
    assert contents(tmp_path) == before


MISTAKES = {
    "model": ({"model": "gpt-9"}, "no model 'gpt-9'"),
    "data": ({"data": "sqll"}, "did you mean 'sql'"),
    "k": ({"k": 33}, "more than the 32 directions"),
    "k pattern": ({"k": {"q_proj": 4}}, "no pattern of k"),
    "target": ({"target_modules": ["quark"]}, "match nothing in LlamaForCausalLM"),
    "combination": ({"universal_mode": "replace"}, "needs basis='universal'"),
    "weight_from": ({"weight_from": "bottom", "basis": "random"}, "needs basis='weight'"),
    "context": ({"max_length": 2}, "give a larger max_length"),
    "heldout": ({"heldout": 40}, "none is left to train on"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows_before_anything_is_written_or_lost(name, stopped, recipe, tmp_path):
    changes, words = MISTAKES[name]
    before = contents(tmp_path)
    with pytest.raises(CTError, match=words):
        quiet(recipe(**changes), tmp_path / "new")
    with pytest.raises(CTError, match=words):
        quiet(recipe(**changes), stopped, overwrite=True)
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()


def test_overwrite_removes_the_old_run_and_nothing_else(stopped, unbroken, recipe):
    (stopped / "notes.txt").write_text("mine")
    (stopped / "adapter-lora").mkdir()
    (stopped / "adapter-lora" / "x").write_text("mine")
    run = quiet(recipe(), stopped, overwrite=True)
    assert contents(stopped).keys() >= {"notes.txt", "adapter-lora/x"}
    shutil.rmtree(stopped / "adapter-lora")
    (stopped / "notes.txt").unlink()
    assert_same_run(stopped, run, *unbroken)


def test_overwrite_killed_half_way_leaves_a_run_that_can_be_resumed(stopped, unbroken, recipe, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_json", die)  # the last thing: the new recipe
        with pytest.raises(SystemExit):
            quiet(recipe(seed=7), stopped, overwrite=True)
    assert_same_run(stopped, quiet(recipe(), stopped, resume=True), *unbroken)


def test_a_kill_while_the_folder_was_made_blocks_nothing(recipe, tmp_path):
    (tmp_path / ".recipe.json-123").write_text("{")
    folder.check_folder(recipe(), tmp_path, resume=False, overwrite=False)


def test_unknown_fields_of_an_older_record_are_named(recipe, tmp_path):
    write_json(tmp_path / "recipe.json", recipe().values() | {"colour": "red"})
    with pytest.raises(CTError, match="colour='red'"):
        folder.check_folder(recipe(), tmp_path, resume=True, overwrite=False)


# ---- what the run says


def test_messages(model, recipe, tmp_path):
    (tmp_path / "[b].jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} " * 30, "completion": "b" * 99}) + "\n" for i in range(12))
    )
    heard = io.StringIO()
    chosen = recipe(data=str(tmp_path / "[b].jsonl"), heldout=2, steps=1, eval_rows=2, max_length=100)
    run = tune(chosen, tmp_path / "run", console=Console(file=heard, width=200)).values()
    text = heard.getvalue()
    assert "10 training rows were cut to 100 tokens and 0 dropped as too long" in text
    assert (run["data"]["truncated"], run["data"]["dropped"]) == (10, 0)
    assert f"before: held-out loss {run['before']['heldout_loss']:.3f} nats per token" in text
    assert f"after: held-out loss {run['after']['heldout_loss']:.3f} nats per token" in text
    assert "training 56 numbers of 34,080" in text


@pytest.mark.usefixtures("plain_report")
def test_held_out_rows_that_do_not_fit_are_told(recipe, tmp_path):
    lengths = [9] * 30 + [99] * 4
    rows = [{"prompt": f"{i}" + "b" * n, "completion": "c" * n} for i, n in enumerate(lengths)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = recipe(data=str(tmp_path / "rows.jsonl"), heldout=17, steps=1, eval_rows=17)
    heldout = load_corpus(chosen.data, seed=0, heldout=17).heldout
    lost = sum(len(row["prompt"]) > 64 for row in heldout)
    assert 0 < lost < 4
    run = quiet(chosen, tmp_path / "run")
    assert run["data"]["heldout_rows"] == 17 - lost
    assert f"0 held-out rows were cut to 64 tokens and {lost} dropped as too long" in run["data"]["notes"]
    one = next(i for i in range(99) if len(load_corpus(chosen.data, seed=i, heldout=1).heldout[0]["prompt"]) > 64)
    with pytest.raises(CTError, match=r"^No held-out row has anything to learn within 64 tokens: give a larger max_l"):
        quiet(recipe(data=chosen.data, heldout=1, seed=one), tmp_path / "none")


@pytest.mark.usefixtures("plain_report")
def test_where_there_is_no_terminal_every_stage_tells_what_is_left(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.001)
    heard = io.StringIO()
    tune(recipe(basis="gradient", lr=0.01), tmp_path / "run", console=Console(file=heard, width=200))
    text = heard.getvalue()
    assert "\r" not in text and "\x1b" not in text
    for stage, total in (("calibrating", 1), ("measuring the model as it is", 10), ("measuring the tuned model", 10)):
        assert re.search(rf"^{stage}: \d+ of {total}, \S+ left$", text, flags=re.MULTILINE), stage
    assert re.search(rf"^training: 3 of {STEPS}, \S+ left, loss \d\.\d+, [\d,]+ tokens/s$", text, flags=re.MULTILINE)
    assert re.search(r"^reading the spectra: \d+ of 14, \S+ left$", text, flags=re.MULTILINE)
    assert re.search(rf"^loading .*{recipe().model}: 0 s$", text, flags=re.MULTILINE)


def test_columns_by_name(recipe, tmp_path):
    rows = [{"ask": f"{i} and {i}?", "reply": " aaaa", "level": i} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = {"data": str(tmp_path / "mine.jsonl"), "steps": 1}
    with pytest.raises(CTError, match="ask, reply"):
        quiet(recipe(**wanted), tmp_path / "run")
    run = quiet(recipe(**wanted, prompt_column="ask", completion_column="reply"), tmp_path / "run")
    assert run["data"]["kind"] == "prompt_completion" and run["data"]["train_rows"] == 32
    assert {s["reference"] for s in run["samples"]} == {" aaaa"} and "?" in run["samples"][0]["prompt"]
