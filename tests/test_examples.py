"""Every example runs, on a tiny model where it names one of its own."""

import json
import re
import runpy
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from ctsft.cli import main as cli

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A folder with a model and rows, and the examples of the package beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    tiny.save_model(tmp_path / "my-model", hidden_size=64, intermediate_size=96)  # room for K = 64
    tiny.save_rows(tmp_path / "my.jsonl")
    return tmp_path


def script(monkeypatch, name, *words):
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_tested():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert [p.name for p in EXAMPLES.iterdir() if p.is_file() and f'"{p.name}"' not in tested] == []


def test_training_with_trl_learns_and_the_adapter_becomes_a_lora(inside, monkeypatch, capsys):
    script(monkeypatch, "train_with_trl.py", "my-model", "my.jsonl", "--steps", "40", "--out", "runs/trl")
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after", capsys.readouterr().out).groups())
    assert after < before / 2
    script(monkeypatch, "load_and_export.py", "runs/trl/adapter", "--prompt", "red green blue?", "--out", "my-lora")
    said = capsys.readouterr().out
    assert re.search(r"tuned: .*aaaa", said)
    assert float(re.search(r"adapter and LoRA: (\S+)", said).group(1)) < 1e-4


def test_own_data(inside, monkeypatch, capfd):
    """The commands of the script, in this process: each start of Python costs seconds."""
    path = EXAMPLES / "own_data.sh"
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    rows = [json.loads(line) for line in (inside / "my.jsonl").read_text().splitlines()]
    renamed = [{"id": i, "problem": r["prompt"], "solution": r["completion"]} for i, r in enumerate(rows)]
    (inside / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    given = {"model": "my-model", "data": "problems.jsonl", "out": "runs/own"}
    lines = [line for line in path.read_text().splitlines() if line.startswith("ctsft ")]
    assert len(lines) == 3
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(string.Template(line).substitute(given)))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capfd.readouterr().err
    assert (inside / "runs" / "own" / "lora" / "adapter_model.safetensors").exists()


def test_a_fleet(inside, monkeypatch, capsys):
    """All of the demo on a tiny model: what is learned once is used again, and every way gets its own line."""
    tiny.save_model(inside / "wide", context=512, hidden_size=64, intermediate_size=96)
    asked = ["--model", "wide", "--siblings", "zoo", "law", "--unseen", "space", "--k", "4", "--steps", "4"]
    asked += ["--rows", "4", "--seconds", "0.3", "--questions", "3", "--out", "runs/fleet"]
    script(monkeypatch, "fleet.py", *asked)
    said = capsys.readouterr().out
    record = json.loads((inside / "runs" / "fleet" / "fleet.json").read_text())
    base, mean, ours, lora = record["results"].values()
    assert base["numbers"] == mean["numbers"] == 0 and ours["numbers"] == 14 * 4 and lora["numbers"] > 9_000
    assert ours["steps"] > 0 < lora["steps"] and ours["loss"] < mean["loss"] < base["loss"]
    adapter = (inside / "runs" / "fleet" / "space" / "adapter_model.safetensors").stat().st_size
    assert adapter < ours["bytes"] < 3_000 < lora["bytes"]
    assert "4 amplitudes a matrix" in said and "0 of 3" in said
    before = (inside / "runs" / "fleet" / "directions" / "basis.safetensors").read_bytes()
    script(monkeypatch, "fleet.py", *asked, "--steps", "1")
    assert (inside / "runs" / "fleet" / "directions" / "basis.safetensors").read_bytes() == before
    with pytest.raises(SystemExit):
        script(monkeypatch, "fleet.py", *asked, "--unseen", "zoo")
    assert "zoo is among the databases" in capsys.readouterr().err


def test_the_tour_says_what_it_shows(inside, capsys):
    """The cells in their order; what they print is what the notebook has stored, but for digits."""
    names = {"__name__": "__main__"}
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    capsys.readouterr()
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            stored = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
            assert re.sub(r"[\d.+-]+", "0", capsys.readouterr().out) == re.sub(r"[\d.+-]+", "0", stored)
