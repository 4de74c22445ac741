import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from command import assert_one_sentence, options
from ctsft.cli import console
from ctsft.cli import options as given_as
from ctsft.cli import tune as cli
from ctsft.errors import CTError
from ctsft.files import read_json
from ctsft.tune import material, trainer
from ctsft.tune import run as train
from ctsft.tune.recipe import FIELDS, Recipe, make_recipe
from ctsft.tune.record import run_record

# ---- options


def test_help_tells_the_true_defaults(ctsft):
    text = " ".join(ctsft("tune", "--help")[1].replace("│", " ").split())
    for name, default in make_recipe({}).values().items():
        _, _, told = text.partition(f"--{name.replace('_', '-')} ")
        words = name in ("threads", "k") or default is None or default is False  # these are told in words
        if told and not words:
            assert told.split("(default: ")[1].split(")")[0] == str(default).removesuffix(".0"), name


def test_every_field_of_the_recipe_is_an_option_with_its_description(ctsft):
    text = " ".join(ctsft("tune", "--help")[1].replace("│", " ").split())
    for name in FIELDS:
        option = "--target" if name == "target_modules" else f"--{name.replace('_', '-')}"
        told = Recipe.__dataclass_fields__[name].metadata["description"].replace("`", "")
        assert f" {option} " in text and all(word in text for word in told.split()), name


def test_options_of_every_type_arrive_in_the_recipe(ctsft, monkeypatch, tmp_path):
    heard = []

    def tune(recipe, *_):
        heard.append(recipe)
        raise CTError("heard")

    monkeypatch.setattr(train, "tune", tune)
    given = "--k q_proj=3,.*=2 --lr 0.5 --target q_proj --target v_proj --store-basis --samples 0 --heldout 20"
    given += " --basis-dtype float32 --prompt-column question"
    assert ctsft("tune", *given.split(), "--out", tmp_path / "a")[2] == "error: heard\n"
    assert ctsft("tune", "--k", 64, "--out", tmp_path / "b")[0] == 2
    wanted = {"k": {"q_proj": 3, ".*": 2}, "lr": 0.5, "target_modules": ["q_proj", "v_proj"], "store_basis": True}
    more = {"samples": 0, "heldout": 20, "basis_dtype": "float32", "prompt_column": "question"}
    assert heard == [make_recipe(wanted | more), make_recipe({})]


def test_columns_of_other_names_are_named_and_the_message_says_how(ctsft, files, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("input,target\n" + "".join(f"{i} and {i}?,{2 * i}\n" for i in range(20)))
    given = options((files[0], data), steps=1)
    told = ctsft("tune", *given, "--out", tmp_path / "run")
    assert_one_sentence(told, "has the fields input, target", "--prompt-column and --completion-column")
    named = ("--prompt-column", "input", "--completion-column", "target")
    assert ctsft("tune", *given, *named, "--samples", 1, "--allow-worse", "--out", tmp_path / "run")[0] == 0
    assert read_json(tmp_path / "run" / "run.json")["samples"][0]["prompt"].rstrip().endswith("?")


@pytest.mark.parametrize(
    ("text", "k"), [("64", 64), ("q_proj=64,.*=16", {"q_proj": 64, ".*": 16}), (r"a=b=3", {"a=b": 3})]
)
def test_parse_k(text, k):
    assert given_as.parse_k(text) == k


@pytest.mark.parametrize("text", ["", "many", "6.4", "q_proj=", "q_proj=a,.*=16", "q_proj=4,,"])
def test_parse_k_refuses(text):
    with pytest.raises(CTError, match=r"--k .* is neither a number nor pattern=number"):
        given_as.parse_k(text)


def test_parse_lr():
    assert (given_as.parse_lr("auto"), given_as.parse_lr("1e-2")) == ("auto", 0.01)
    with pytest.raises(CTError, match="neither a number nor auto"):
        given_as.parse_lr("fast")


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("0", None), ("", None), ("4,2", None), ("-1", None)])
def test_default_threads(monkeypatch, value, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert given_as.default_threads() == (threads or len(os.sched_getaffinity(0)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert given_as.default_threads() == len(os.sched_getaffinity(0))


# ---- a run


def test_tune_json_is_all_that_is_on_standard_output(ctsft, files, tmp_path):
    code, out, err = ctsft("tune", *options(files), "--out", tmp_path / "run", "--json")
    assert code == 0
    run = json.loads(out)
    assert run == json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["recipe"]["threads"] == 1 and run["recipe"]["k"] == 4
    assert "before: held-out loss" in err and "after: held-out loss" in err


def test_tune_tells_a_person(ctsft, files, tmp_path):
    code, out, err = ctsft("tune", *options(files), "--out", tmp_path / "run", "--k", "q_proj=3,.*=2")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert code == 0
    for when in ("before", "after"):
        assert f"{run[when]['heldout_loss']:.3f}" in out
        assert run["samples"][0][when].split("\n")[0][:20] in out or not run["samples"][0][when].isprintable()
    assert run["samples"][0]["prompt"] in out
    assert f"{run['costs']['trainable']:,} trained numbers" in out
    assert str(tmp_path / "run" / "report.html") in out
    assert "\x1b" not in out and "Traceback" not in err


def test_show_run_with_accuracy(finished, capsys):
    run = json.loads((finished / "run.json").read_text())
    accuracy = {"correct": 3, "total": 12, "low": 0.09, "high": 0.53, "by_kind": {}}
    run["before"]["accuracy"], run["after"]["accuracy"] = accuracy, accuracy | {"correct": 11}
    run["samples"][0] |= {"before_ok": False, "after_ok": True, "after": "[bold]\x1b[31m", "prompt": "x" * 700}
    cli.show_run(run_record(run), finished)
    out = capsys.readouterr().out
    assert "3 of 12" in out and "11 of 12" in out and "9% to 53%" in out
    assert "wrong" in out and "right [bold]\N{REPLACEMENT CHARACTER}[31m" in out
    assert "x" * 600 not in out.replace("\n", "") + "x" or "..." in out


MISTAKES = {
    "k": (["--k", "many"], "--k 'many' is neither"),
    "k of 0": (["--k", "0"], "k=0"),
    "k too large": (["--k", "33"], "more than the 32 directions", "lower k"),
    "lr": (["--lr", "fast"], "--lr 'fast' is neither"),
    "lr of -1": (["--lr", "-1"], "lr=-1.0"),
    "several": (["--form", "round", "--steps", "0", "--dtype", "int3"], "form='round'", "steps=0", "dtype='int3'"),
    "combination": (["--basis", "random", "--weight-from", "bottom"], "needs basis='weight'"),
    "two files": (
        ["--basis", "/my/one", "--basis-file", "/my/two"],
        "--basis '/my/one' says where",
        "--basis-file out",
    ),
    "target": (["--target", "[/quark]"], "['[/quark]'] match nothing", "q_proj"),
    "model": (["--model", "smollm"], "no model 'smollm'", "did you mean 'smollm2-135m'?"),
    "model folder": (["--model", "/"], "no config.json"),
    "data": (["--data", "nowhere.jsonl"], "no data 'nowhere.jsonl'"),
    "both": (["--resume", "--overwrite"], "give one of them"),
    "nothing there": (["--resume"], "no run to resume"),
    "out below a file": (["--out", "/dev/null/run"], "/dev/null"),
    "out is a file": (["--out", "/dev/null"], "no run of ctsft"),
    "threads": (["--threads", "100000"], "threads=100000", "less than or equal to 1024"),
    "k beyond all": (["--k", "9" * 20], "k=99999999999999999999"),
    "k of many digits": (["--k", "9" * 10_000], "--k 999", "of 10,000 digits"),
    "k of many digits by pattern": (["--k", "q_proj=" + "9" * 10_000], "--k 'q_proj=999", "is neither a number"),
    "large k": (["--k", "1000000000"], "k=1000000000 is more than the 32 directions"),
    "steps": (["--steps", "9" * 15], "steps=999999999999999"),
    "steps of many digits": (
        ["--steps", "9" * 10_000],
        "--steps 999",
        "is a number of 10,000 digits; give a smaller one.",
    ),
    "seed of many digits": ([f"--seed=-{'9' * 5_000}"], "--seed -999", "is a number of 5,000 digits"),
    "lr of many digits": (["--lr", "9" * 400], "lr=inf"),
    "heldout of many digits": (["--heldout", "9" * 400], "heldout=inf"),
    "markup in model": (["--model", "[red]x[/x]"], "[red]x[/x]"),
}


def test_markup_in_out_is_taken_as_it_is(ctsft, files, tmp_path):
    out = tmp_path / "[red]x[" / "x]"  # as a path, [red]x[/x]
    code, printed, err = ctsft("tune", *options(files), "--out", out)
    assert code == 0 and str(out / "report.html") in printed.replace("\n", "") and "Traceback" not in err
    assert_one_sentence(ctsft("tune", *options(files), "--out", out), f"{out} holds a run that is finished")


RUINS = {  # a file of a stopped run, what then is in it, and what is told of it
    "recipe.json is a list": ("recipe.json", "[]", "recipe.json is not from this ctsft"),
    "recipe.json has wrong types": ("recipe.json", '{"k": {}, "steps": [1]}', "k={}", "steps=[1]"),
    "recipe.json has 10,000 digits": ("recipe.json", '{"k": ' + "9" * 10_000 + "}", "recipe.json cannot be read"),
    "recipe.json is nested": ("recipe.json", "[" * 100_000, "recipe.json cannot be read as JSON"),
    "recipe.json is no UTF-8": ("recipe.json", b"\xff", "recipe.json cannot be read as JSON"),
    "run.json is damaged": ("run.json", "{", "is finished"),
    "sources.json is a list": ("sources.json", "[1]", "sources.json is damaged"),
}


@pytest.fixture
def stopped(ctsft, files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", interrupt)
        assert ctsft("tune", *options(files), "--out", tmp_path / "run")[0] == 130
    return tmp_path / "run"


@pytest.mark.parametrize("name", RUINS)
def test_a_ruined_file_of_a_run_is_one_sentence_and_costs_nothing(name, ctsft, stopped):
    file, content, *words = RUINS[name]
    (stopped / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = {p.name: p.read_bytes() for p in stopped.iterdir() if p.is_file()}
    assert_one_sentence(ctsft("tune", "--resume", "--out", stopped), *words)
    assert {p.name: p.read_bytes() for p in stopped.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("content", ["[]", '{"heldout_loss": "x"}', "{", "9" * 10_000])
def test_a_ruined_before_json_is_measured_again_and_that_is_told(content, ctsft, stopped):
    wanted = (stopped / "before.json").read_text()
    (stopped / "before.json").write_text(content)
    code, _, err = ctsft("tune", "--resume", "--out", stopped)
    assert code == 0 and "before.json is damaged; the model as it is, is measured again." in err
    assert (
        json.loads((stopped / "run.json").read_text())["before"]["heldout_loss"] == json.loads(wanted)["heldout_loss"]
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_tune_is_one_sentence(name, ctsft, files, tmp_path):
    changes, *words = MISTAKES[name]
    assert_one_sentence(ctsft("tune", *options(files), "--out", tmp_path / "run", *changes), *words)


def test_a_rate_beyond_all_costs_no_adapter_and_is_told(ctsft, files, tmp_path):
    code, _, err = ctsft("tune", *options(files), "--out", tmp_path / "run", "--lr", "1e30")
    assert code == 3
    assert "Traceback" not in err
    assert "After step 1 the loss was not finite, so the run went on from its state of step 0" in err
    assert "the adapter that was kept is as it began. Try a smaller lr than 1e+30." in err.splitlines()[-1]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_empty_data_is_one_sentence(ctsft, files, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    result = ctsft("tune", *options(files), "--data", tmp_path / "empty.jsonl", "--out", tmp_path / "run")
    assert_one_sentence(result, "empty.jsonl is empty")
    assert not (tmp_path / "run").exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["load_model", "load_corpus", "get_peft_model", "measure", "fit", "save_adapter"])
def test_ctrl_c_at_any_time_tells_how_to_go_on(where, ctsft, files, tmp_path, monkeypatch):
    out = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(material if hasattr(material, where) else train, where, interrupt)
        code, printed, err = ctsft("tune", *options(files), "--out", out)
    assert (code, printed) == (130, "")
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    if where in ("load_model", "load_corpus", "get_peft_model"):
        assert last == "stopped; nothing was begun, so start it again with the same command"
        assert not out.exists()
        return
    assert last.startswith("stopped; continue with: ctsft tune --resume --out ")
    command = shlex.split(last.partition("continue with: ctsft ")[2])
    code, printed, _ = ctsft(*command)
    assert code == 0 and "loss, nats per token" in printed
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_ctrl_c_while_training(ctsft, files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        original = trainer.Watch.on_step_end

        def on_step_end(self, args, state, control, **rest):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)
            return original(self, args, state, control, **rest)

        patch.setattr(trainer.Watch, "on_step_end", on_step_end)
        code, _, err = ctsft("tune", *options(files), "--out", tmp_path / "run")
    assert code == 130
    assert err.strip().splitlines()[-1].startswith("stopped after step 2; continue with: ctsft tune --resume")
    assert_one_sentence(ctsft("tune", "--resume", "--steps", "9", "--out", tmp_path / "run"), "other steps")
    code, out, _ = ctsft("tune", "--resume", "--out", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["resumed"]


def test_ctrl_c_does_not_take_an_old_run_for_the_new_one(ctsft, files, finished, monkeypatch):
    monkeypatch.setattr(material, "load_model", interrupt)
    code, _, err = ctsft("tune", *options(files), "--out", finished, "--overwrite")
    assert code == 130
    assert "nothing was begun" in err
    assert (finished / "run.json").exists()


def test_kill_9_then_resume(ctsft, files, tmp_path):
    """A real process, killed by the system in the middle of its training."""
    args = ["tune", *options(files, steps=60), "--amplitude-dropout", "0.2"]
    assert ctsft(*args, "--out", tmp_path / "unbroken")[0] == 0
    code = "from ctsft.cli import main; from ctsft.tune import trainer; trainer.SAVE_EVERY = 0; main.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True
    )
    with process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoints" / "checkpoint-5").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "run.json").exists()
    assert ctsft("tune", "--resume", "--out", tmp_path / "run")[0] == 0
    found, wanted = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("run", "unbroken"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in found)
    found, wanted = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("run", "unbroken"))
    assert found["after"] == wanted["after"]
    assert [e["loss"] for e in found["curve"]] == [e["loss"] for e in wanted["curve"]]


# ---- a run that ends worse than it began


@pytest.mark.parametrize("more", [(), ("--allow-worse",), ("--json",)])
def test_a_worse_end_is_told_and_has_its_own_exit_code(more, ctsft, files, tmp_path):
    code, out, err = ctsft("tune", *options(files), "--lr", "300", "--out", tmp_path / "run", *more)
    assert code == (0 if "--allow-worse" in more else 3)
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("The training ended worse than it began: the held-out loss rose from ")
    assert last.endswith("Try a smaller lr than 300.")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["worse"]["kept_step"] == 0 and run["after"] == run["before"]
    assert "--json" not in more or json.loads(out) == run
    page = (tmp_path / "run" / "report.html").read_text()
    assert f'<p class="lead bad">{last}</p>' in page
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_worse_end_is_told_in_red(ctsft, files, tmp_path, monkeypatch):
    heard = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=heard, force_terminal=True, color_system="standard"))
    assert ctsft("tune", *options(files), "--lr", "300", "--out", tmp_path / "run")[0] == 3
    assert heard.getvalue().startswith("\x1b[31mThe training ended worse") and heard.getvalue().endswith(
        "300.\x1b[0m\n"
    )
