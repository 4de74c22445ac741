"""What is not ours reaches the terminal as it is: brackets are no markup, control characters do nothing."""

import io
import re
import sys

import pytest
from rich.console import Console

from command import assert_one_sentence, options
from ctsft import progress
from ctsft.cli import console
from ctsft.cli.lab import show_tables
from ctsft.lab.experiments import PAPERS, read_laboratory
from ctsft.tune.inspect import universal_table
from tiny import save_model, save_rows

NAME = "[red]x[/x] [bold]"


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A model and rows whose names are full of brackets, in a folder below which a run can go."""
    monkeypatch.chdir(tmp_path)
    for folder in ("[red]m[", "[red]o["):
        (tmp_path / folder).mkdir()
    return save_model("[red]m[/x]"), save_rows(tmp_path / "[red]rows[bold].jsonl")


def test_names_with_brackets_are_shown_as_they_are(ctsft, odd, tmp_path):
    code, out, err = ctsft("tune", *options(odd, 2), "--lr", "0.05", "--allow-worse", "--out", "[red]o[/x]")
    said = re.sub(r"\s+", " ", out)
    assert code == 0 and "Traceback" not in err
    assert "on [red]rows[bold].jsonl, " in said
    assert "adapter [red]o[/x]/adapter record [red]o[/x]/run.json" in said
    assert_one_sentence(ctsft("tune", *options(odd), "--out", "[red]o[/x]"), "[red]o[/x] holds a run")
    code, out, err = ctsft("inspect", odd[0], "--k", "4", "--plot", "[red]s.svg")
    assert code == 0 and "q_proj" in out and "dim]" not in out and "wrote [red]s.svg" in err
    code, out, err = ctsft("inspect", odd[0], "--universal", "--k", "4")
    assert code == 0 and "[red]m[/x]: " in out
    assert_one_sentence(ctsft("sample", "[red]o[/x]/none", "--prompt", "a"), "[red]o[/x]/none")


def test_what_a_model_wrote_is_no_markup(ctsft, odd, monkeypatch):
    monkeypatch.setattr(
        "ctsft.tune.measure.generate", lambda model, tokenizer, prompts, *_, **__: [NAME] * len(prompts)
    )
    code, out, _ = ctsft("tune", *options(odd, 2), "--lr", "0.05", "--allow-worse", "--out", "o")
    assert code == 0 and out.count(NAME) >= 2


def test_a_spinner_shows_the_name_of_what_is_waited_for(monkeypatch):
    heard = io.StringIO()
    with progress.waiting(Console(file=heard, force_terminal=True, width=80), f"loading {NAME}"):
        pass
    assert NAME in heard.getvalue()


def test_a_title_is_no_markup_wherever_it_is_printed():
    universal = {"members": 2, "k": 2, "explained": 0.5, "curve": [[2, 0.5]]}
    table = universal_table({"model": NAME, "d_model": 4, "universal": universal})
    for markup in (True, False):
        heard = io.StringIO()
        Console(file=heard, width=120, markup=markup).print(table)
        assert NAME in heard.getvalue()


def test_a_heading_of_an_experiment_is_no_markup(capsys, monkeypatch):
    monkeypatch.setattr("ctsft.lab.compare.arm_runs", lambda *_: [])
    monkeypatch.setattr("ctsft.lab.compare.chosen", lambda *_: True)
    monkeypatch.setattr("ctsft.lab.tables.table", lambda *_: (["[red]K"], [["[/x]"]]))
    laboratory = read_laboratory(PAPERS)
    name = next(name for name, experiment in laboratory.experiments.items() if experiment.tables)
    wanted = laboratory.experiments[name].tables[0].model_copy(update={"title": NAME})
    experiment = laboratory.experiments[name].model_copy(update={"tables": (wanted,)})
    show_tables(laboratory.model_copy(update={"experiments": {name: experiment}}), name, None, "quick", "honest")
    out = " ".join(capsys.readouterr().out.split())
    assert f"{name}: {NAME}" in out and "[red]K" in out and "[/x]" in out


def test_a_sentence_does_not_steer_the_terminal(monkeypatch):
    heard = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=heard, width=80))
    console.say("error: \x1b[2J \udcff [red]", "red")
    assert heard.getvalue() == "error: \N{REPLACEMENT CHARACTER}[2J \N{REPLACEMENT CHARACTER} [red]\n"


# ---- the prompt


def test_a_prompt_that_is_not_utf8_is_one_sentence(ctsft, files, monkeypatch):
    assert_one_sentence(ctsft("sample", files[0], "--prompt", "\udcff"), "the prompt is not UTF-8 text")
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8", errors=errors))
        assert_one_sentence(ctsft("sample", files[0]), "the prompt is not UTF-8 text")


def test_a_prompt_longer_than_the_context_is_one_sentence(ctsft, files):
    assert_one_sentence(
        ctsft("sample", files[0], "--prompt", "word " * 1_000_000), "and the model's context 128; shorten"
    )


def test_a_tokenizer_larger_than_the_model_is_one_sentence(ctsft, tmp_path):
    model = save_model(tmp_path / "small", vocab_size=200)
    rows = save_rows(tmp_path / "rows.jsonl")
    sentence = "The tokenizer has 258 tokens and the model embeddings for 200"
    assert_one_sentence(ctsft("sample", model, "--prompt", "red"), sentence)
    assert_one_sentence(ctsft("tune", *options((model, rows)), "--out", tmp_path / "run"), sentence)
