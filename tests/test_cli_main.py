import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from ctsft.adapter import export
from ctsft.cli import main as cli
from ctsft.errors import CTError
from ctsft.tune import run as train
from ctsft.tune.recipe import make_recipe

COMMANDS = ("tune", "export", "inspect", "sample")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def ctsft(monkeypatch, capfd):
    """Run the command as a user does; returns its exit code, standard output and standard error."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["ctsft", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return tiny.save_model(folder / "llama"), tiny.save_rows(folder / "rows.jsonl")


def options(files, steps=4):
    small = f"--k 4 --steps {steps} --batch-size 4 --heldout 8 --eval-rows 4 --max-length 64"
    return ["--model", files[0], "--data", files[1], *small.split()]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A finished run, made by the command, with what it printed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "argv", ["ctsft", "tune", *options(files), "--lr", "0.05", "--out", str(out)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return out


def assert_one_sentence(result, *words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    for word in words:
        assert word in err


# ---- help


def test_help_is_quick():
    """Neither the command line nor its help needs the seconds that torch and peft take."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom ctsft.cli.main import app\n"
        f"for command in {COMMANDS}: assert CliRunner().invoke(app, [command, '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'peft', 'transformers', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_an_example(ctsft, command):
    code, out, _ = ctsft(command, "--help")
    assert code == 0
    assert f"Example: ctsft {command}" in out


def test_help_tells_the_true_defaults(ctsft):
    text = " ".join(ctsft("tune", "--help")[1].replace("│", " ").split())
    for name, default in make_recipe({}).values().items():
        _, _, told = text.partition(f"--{name.replace('_', '-')} ")
        if told and name not in ("threads", "limit"):  # told in words
            assert told.split("(default: ")[1].split(")")[0] == str(default).removesuffix(".0"), name


def test_no_command_shows_the_help(ctsft):
    code, out, _ = ctsft()
    assert code in (0, 2)
    assert all(command in out for command in COMMANDS)


# ---- values


@pytest.mark.parametrize(
    ("text", "k"), [("64", 64), ("q_proj=64,.*=16", {"q_proj": 64, ".*": 16}), (r"a=b=3", {"a=b": 3})]
)
def test_parse_k(text, k):
    assert cli.parse_k(text) == k


@pytest.mark.parametrize("text", ["", "many", "6.4", "q_proj=", "q_proj=a,.*=16", "q_proj=4,,"])
def test_parse_k_refuses(text):
    with pytest.raises(CTError, match=r"--k .* is neither a number nor pattern=number"):
        cli.parse_k(text)


def test_parse_lr():
    assert (cli.parse_lr("auto"), cli.parse_lr("1e-2")) == ("auto", 0.01)
    with pytest.raises(CTError, match="neither a number nor auto"):
        cli.parse_lr("fast")


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("0", None), ("", None), ("4,2", None), ("-1", None)])
def test_default_threads(monkeypatch, value, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cli.default_threads() == (threads or len(os.sched_getaffinity(0)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cli.default_threads() == len(os.sched_getaffinity(0))


def test_printable_keeps_text_and_drops_control():
    assert cli.printable("a\tä\n\N{SNOWMAN}") == "a\tä\n\N{SNOWMAN}"
    assert cli.printable("\x1b[31mred\x07\r") == "\N{REPLACEMENT CHARACTER}[31mred" + "\N{REPLACEMENT CHARACTER}" * 2


# ---- tune


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
    cli.show_run(run, finished)
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
    "target": (["--target", "[/quark]"], "['[/quark]'] match nothing", "q_proj"),
    "model": (["--model", "smollm"], "no model 'smollm'", "did you mean 'smollm2-135m'?"),
    "model folder": (["--model", "/"], "no config.json"),
    "data": (["--data", "nowhere.jsonl"], "no data 'nowhere.jsonl'"),
    "both": (["--resume", "--overwrite"], "give one of them"),
    "nothing there": (["--resume"], "no run to resume"),
    "out below a file": (["--out", "/dev/null/run"], "/dev/null"),
    "out is a file": (["--out", "/dev/null"], "no run of ctsft"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_tune_is_one_sentence(name, ctsft, files, tmp_path):
    changes, *words = MISTAKES[name]
    assert_one_sentence(ctsft("tune", *options(files), "--out", tmp_path / "run", *changes), *words)


def test_a_rate_beyond_all_ends_in_one_sentence(ctsft, files, tmp_path):
    code, out, err = ctsft("tune", *options(files), "--out", tmp_path / "run", "--lr", "1e30")
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "error: the loss is nan at step 2; start anew with a smaller lr."


def test_empty_data_is_one_sentence(ctsft, files, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    result = ctsft("tune", *options(files), "--data", tmp_path / "empty.jsonl", "--out", tmp_path / "run")
    assert_one_sentence(result, "empty.jsonl is empty")
    assert not (tmp_path / "run").exists()


def test_an_unknown_option_and_a_word_for_a_number(ctsft):
    for args in (("tune", "--colour", "red"), ("tune", "--steps", "many"), ("dance",)):
        code, out, err = ctsft(*args)
        assert (code, out) == (2, "")
        assert "Usage: ctsft" in err and "Traceback" not in err


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["load_model", "load_corpus", "get_peft_model", "measure", "fit", "save_adapter"])
def test_ctrl_c_at_any_time_tells_how_to_go_on(where, ctsft, files, tmp_path, monkeypatch):
    out = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(train, where, interrupt)
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
        original = train.Watch.on_step_end

        def on_step_end(self, args, state, control, **rest):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)
            return original(self, args, state, control, **rest)

        patch.setattr(train.Watch, "on_step_end", on_step_end)
        code, _, err = ctsft("tune", *options(files), "--out", tmp_path / "run")
    assert code == 130
    assert err.strip().splitlines()[-1].startswith("stopped after step 2; continue with: ctsft tune --resume")
    assert_one_sentence(ctsft("tune", "--resume", "--steps", "9", "--out", tmp_path / "run"), "other steps")
    code, out, _ = ctsft("tune", "--resume", "--out", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["resumed"]


def test_ctrl_c_does_not_take_an_old_run_for_the_new_one(ctsft, files, finished, monkeypatch):
    monkeypatch.setattr(train, "load_model", interrupt)
    code, _, err = ctsft("tune", *options(files), "--out", finished, "--overwrite")
    assert code == 130
    assert "nothing was begun" in err
    assert (finished / "run.json").exists()


def test_kill_9_then_resume(ctsft, files, tmp_path):
    """A real process, killed by the system in the middle of its training."""
    args = ["tune", *options(files, steps=60), "--amplitude-dropout", "0.2"]
    assert ctsft(*args, "--out", tmp_path / "unbroken")[0] == 0
    code = "from ctsft.cli import main; from ctsft.tune import run; run.SAVE_EVERY = 0; main.main()"
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


# ---- export, sample, inspect


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_export_measures_the_difference(ctsft, finished, tmp_path, to):
    code, out, err = ctsft("export", finished, "--to", to, "--out", tmp_path / to)
    assert code == 0 and "Traceback" not in err
    difference = float(out.split("random tokens: ")[1].split()[0])
    reach = float(out.split("logits reach ")[1].rstrip(")\n"))
    assert difference < 1e-4 < 0.1 < reach
    assert str(tmp_path / to) in out
    names = {p.name for p in (tmp_path / to).iterdir()}
    wanted = (
        {"adapter_model.safetensors", "adapter_config.json"} if to == "lora" else {"model.safetensors", "config.json"}
    )
    assert names >= wanted | {"tokenizer.json"}


def test_export_beside_the_adapter_by_default_and_never_over_it(ctsft, finished):
    assert ctsft("export", finished / "adapter")[0] == 0
    assert (finished / "adapter-lora" / "adapter_model.safetensors").exists()
    assert_one_sentence(ctsft("export", finished / "adapter"), "adapter-lora exists; choose another place")


def test_the_difference_would_show(ctsft, finished, tmp_path, monkeypatch):
    """The number that is printed is that of the files: spoil them and it grows."""
    original = export.export_adapter

    def spoilt(model, out, *args, **kwargs):
        notes = original(model, out, *args, **kwargs)
        path = Path(out) / "adapter_model.safetensors"
        save_file({n: t * 1.5 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
        return notes

    monkeypatch.setattr(export, "export_adapter", spoilt)
    _, out, _ = ctsft("export", finished, "--out", tmp_path / "lora")
    assert float(out.split("random tokens: ")[1].split()[0]) > 1e-2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "nowhere holds no adapter"),
        (["RUN", "--to", "onnx"], "--to 'onnx' is unknown; choose lora or merged"),
        (["RUN", "--model", "smollm"], "no model 'smollm'"),
        (["MODEL"], "holds no adapter"),
    ],
)
def test_a_mistake_in_export_is_one_sentence(ctsft, finished, files, args, words):
    args = [{"RUN": finished, "MODEL": files[0]}.get(a, a) for a in args]
    assert_one_sentence(ctsft("export", *args), words)


def test_sample(ctsft, finished, files, monkeypatch):
    say = ["--prompt", "red green?", "--max-new-tokens", "8"]
    code, of_run, _ = ctsft("sample", finished, *say)
    assert code == 0 and of_run.strip()
    assert ctsft("sample", finished / "adapter", *say)[1] == of_run
    of_model = ctsft("sample", files[0], *say)[1]
    assert of_model != of_run
    assert ctsft("sample", finished, "--base", *say)[1] == f"base:  {of_model}tuned: {of_run}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("red green?"))
    assert ctsft("sample", finished, "--max-new-tokens", "8")[1] == of_run


def test_a_mistake_in_sample_is_one_sentence(ctsft, finished, files, tmp_path):
    assert_one_sentence(ctsft("sample", finished, "--prompt", " \n"), "the prompt is empty")
    assert_one_sentence(ctsft("sample", "smollm", "--prompt", "x"), "did you mean 'smollm2-135m'?")
    assert_one_sentence(ctsft("sample", files[0], "--base", "--prompt", "x"), "--base compares an adapter")
    assert_one_sentence(ctsft("sample", files[0], "--prompt", "x" * 200), "200 tokens", "128")
    (tmp_path / "recipe.json").write_text("{}")
    assert_one_sentence(ctsft("sample", tmp_path, "--prompt", "x"), "holds no adapter")


def test_inspect(ctsft, files, tmp_path):
    code, out, _ = ctsft("inspect", files[0], "--k", "4", "--json", "--plot", tmp_path / "s.svg")
    found = json.loads(out)
    assert code == 0 and found["k"] == 4 and len(found["matrices"]) == 16
    assert (tmp_path / "s.svg").read_text().count("<svg")
    code, out, _ = ctsft("inspect", files[0], "--k", "4")
    assert code == 0 and "q_proj" in out
    assert_one_sentence(ctsft("inspect", files[0], "--k", "0"), "must be at least 1")
    assert_one_sentence(ctsft("inspect", files[0], "--plot", tmp_path / "s.doc"), ".svg")


def test_inspect_universal_does_not_load_the_model(ctsft, files, tmp_path, monkeypatch):
    whole = json.loads(ctsft("inspect", files[0], "--k", "5", "--json")[1])["universal"]
    monkeypatch.setattr("ctsft.models.load.load_model", None)
    code, out, _ = ctsft("inspect", files[0], "--universal", "--k", "5", "--json")
    assert code == 0 and json.loads(out) == {"model": files[0], "d_model": 32, "k": 5, "universal": whole}
    code, out, _ = ctsft("inspect", files[0], "--universal", "--k", "5")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and ["5", f"{whole['explained']:.1%}"] in lines and ["32", "100.0%"] in lines
    for arguments, message in (
        ((files[0], "--k", "0"), "must be at least 1"),
        ((files[0], "--plot", tmp_path / "s.svg"), "nothing to --plot"),
        ((tmp_path,), "has no config.json"),
    ):
        assert_one_sentence(ctsft("inspect", *arguments, "--universal"), message)
