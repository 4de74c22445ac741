import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ctsft.cli import lab as cli_lab
from ctsft.cli.main import app
from ctsft.errors import CTError
from ctsft.lab.compare import arm_runs
from ctsft.lab.experiments import PAPERS
from ctsft.lab.spec import Spec
from ctsft.models.load import load_model
from ctsft.models.photonic import PhotonicGPTConfig, PhotonicGPTForCausalLM

ROOT = Path(__file__).parents[1]


def lab(*words):
    result = CliRunner().invoke(app, ["lab", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_list_names_every_experiment(here):
    said = lab("list", "--profile", "quick")
    for path in PAPERS.glob("*.toml"):
        assert path.stem in said or path.stem in ("defaults", "claims", "summary"), path


def test_an_experiment_that_the_profile_leaves_out_is_told(here, tmp_path):
    said = lab("run", "arena-long", "--profile", "quick", "--records", tmp_path)
    assert "arena-long has no arms for --profile quick --protocol honest" in said and not list(tmp_path.iterdir())


def test_from_any_folder_the_papers_are_there_and_no_run_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Amplitude-only SFT" in lab("list", "--profile", "quick")
    with pytest.raises(CTError, match=r"nowhere/defaults\.toml cannot be read"):
        cli_lab.list_experiments(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["list", "--profile", "huge"], "there is no profile 'huge'"),
        (["list", "--protocol", "kind"], "there is no protocol 'kind'; there are honest, paper"),
        (["run", "no-such"], "there is no experiment 'no-such'"),
    ],
)
def test_wrong_words_are_one_sentence(here, words, sentence, tmp_path):
    with pytest.raises(CTError, match=sentence):
        CliRunner().invoke(app, ["lab", *words, "--records", str(tmp_path)], catch_exceptions=False)


def test_a_small_experiment_runs_resumes_and_is_reported(tmp_path):
    """The whole way, from a TOML of one arm to tables, verdicts and the page; the second call computes nothing."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "defaults.toml").write_text((PAPERS / "defaults.toml").read_text())
    (folder / "claims.toml").write_text(
        """
[[claim]]
id = "t.1"
source = "ours"
text = "K=4 trains 132 numbers."
experiments = ["tiny"]
predicate = "exact"
metric = "trained"
where = { k = 4, steps = 1 }
number = 132
effect = 0.0
"""
    )
    (folder / "tiny.toml").write_text(
        """
title = "One arm"
question = "Does it run?"
source = "ours"
base = { steps = 1, length = 8 }
arms = [{ name = "only", k = [2, 4], rates = [0.01], seeds = 1 }]

[[tables]]
title = "Loss"
columns = { K = "k", "Final loss" = "train_loss", Trained = "trained" }
paper = [{ K = 2, "Final loss" = 9.5846 }]
"""
    )
    here = ("--profile", "quick", "--experiments", folder, "--records", tmp_path / "records")
    words = ("run", "tiny", *here, "--workers", 1)
    said = lab(*words)
    assert "9.5846" in said and "132" in said
    (kept,) = (tmp_path / "records").glob("*.jsonl")
    assert kept.name == "photonic-diagonal.jsonl" and len(kept.read_text().splitlines()) == 2
    before = kept.stat().st_mtime_ns
    lab(*words)
    assert kept.stat().st_mtime_ns == before
    lab("report", *here, "--out", tmp_path / "lab.html")
    assert "Does it run?" in (tmp_path / "lab.html").read_text()


def test_an_experiment_on_one_s_own_model_and_text(tmp_path, monkeypatch):
    """Arms of other models are left out, claims that can be asked are judged, and the paper's own are told apart."""
    folder, model = tmp_path / "experiments", tmp_path / "mine"
    folder.mkdir()
    (folder / "defaults.toml").write_text((PAPERS / "defaults.toml").read_text())
    (folder / "tiny.toml").write_text(
        'title = "One arm"\nquestion = "?"\nsource = "ours"\nbase = { steps = 1, length = 8 }\n'
        'arms = [{ k = [2, 4, 99], rates = [0.01] }, { name = "theirs", model = "stories15m", rates = [0.01] }]\n'
    )
    plain = 'source = "ours"\nexperiments = ["tiny"]\npredicate = "exact"\neffect = 0.0\n'
    (folder / "claims.toml").write_text(
        f'[[claim]]\nid = "a"\ntext = "One step."\nmetric = "steps"\nwhere = {{ k = 4 }}\nnumber = 1\n{plain}'
        f'[[claim]]\nid = "b"\ntext = "132."\nmetric = "trained"\nwhere = {{ k = 4 }}\nnumber = 132\n{plain}'
        f'[[claim]]\nid = "c"\ntext = "One."\nmetric = "steps"\nwhere = {{ k = 99 }}\nnumber = 1\n{plain}'
    )
    torch.manual_seed(0)
    config = PhotonicGPTConfig(n_embd=16, n_layer=2, n_head=2, eos_token_id=0, pad_token_id=0)
    PhotonicGPTForCausalLM(config).save_pretrained(model)
    load_model("photonic").tokenizer.save_pretrained(model)
    (tmp_path / "my.txt").write_text("\n\n".join(f"line {i} has the number {i * i}" for i in range(2000)))
    monkeypatch.chdir(tmp_path)
    own = ("--model", "mine", "--data", "my.txt", "--experiments", folder, "--profile", "quick", "--seeds", 3)
    said = " ".join(lab("run", "tiny", *own, "--workers", 1).split())
    assert "left out of tiny: 1 arms (K above 16, which is all" in said
    assert "left out of tiny: 1 arms (runs of stories15m)" in said
    assert "1 confirmed, 0 refuted, 0 artefact, 0 inconclusive, 0 not run, 2 not applicable" in said
    assert "1 not applicable: its number, 132, was measured on the model of its source" in said
    assert "1 not applicable: it needs an arm that is left out here (k 99)" in said
    (kept,) = Path("runs/lab").glob("*.jsonl")
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert kept.name == "mine-diagonal.jsonl" and len(found) == 6
    assert {one["weights"] for one in found} == {one["spec"]["weights"] for one in found} != {""}
    assert "1 confirmed" in lab("verdicts", *own)
    told = Path("runs/lab/VERDICTS.md").read_text()
    assert "| a | One step. | **confirmed**" in told and f"from runs of {model} on {tmp_path / 'my.txt'};" in told
    assert "## Not applicable" in told and "committed" not in told
    lab("report", *own, "--out", "lab.html")
    page = Path("lab.html").read_text()
    assert "not applicable" in page and f"On <b>{model}</b> and the text" in page
    with pytest.raises(CTError, match=r"runs/lab has no runs of photonic on .*my\.txt; make them with: ctsft lab run"):
        lab("verdicts", *own[2:])


def test_verdicts_need_no_torch_and_stale_ones_are_told(tmp_path):
    out = tmp_path / "VERDICTS.md"
    (tmp_path / "records").mkdir()
    words = ["lab", "verdicts", "--out", str(out), "--records", str(tmp_path / "records")]
    code = f"""
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("torch", "transformers", "peft"), name
sys.meta_path.insert(0, NoTorch())
sys.argv[1:1] = {words!r}
from ctsft.cli.main import main
main()
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    subprocess.run([*run, "--check"], cwd=ROOT, check=True)
    out.write_text(out.read_text() + "more\n")
    stale = subprocess.run([*run, "--check"], cwd=ROOT, capture_output=True, text=True)
    assert stale.returncode and "is stale" in stale.stderr


def test_the_committed_verdicts_are_what_the_committed_records_say(here):
    lab("verdicts", "--check")


def test_arms_of_the_arena_that_should_train_equally_many_numbers_do(here):
    laboratory, known = cli_lab.opened(None, Path("records"))
    ran = [row for row in arm_runs(laboratory, "arena", known) if row.records]
    lora = {(row.spec.model, row.spec.k): row.mean("trained") for row in ran if row.spec.method == "lora"}
    assert len({model for model, _ in lora}) >= 2
    for row in ran:
        if row.name == "64 a matrix":
            assert row.mean("trained") == 64 * row.mean("matrices")
        if row.name.startswith("as many as LoRA r"):
            assert row.mean("trained") == pytest.approx(lora[row.spec.model, int(row.name[17:])], rel=0.02)


def test_committed_records_are_whole_lines_of_this_format_in_the_file_of_their_model_and_method():
    for path in (ROOT / "records").glob("*.jsonl"):
        *lines, end = path.read_text(encoding="utf-8").split("\n")
        found = [json.loads(line) for line in lines]
        assert end == "" and {record["format"] for record in found} == {1}
        specs = [Spec(**record["spec"]) for record in found]
        assert {f"{spec.short}-{spec.method}.jsonl" for spec in specs} == {path.name}
