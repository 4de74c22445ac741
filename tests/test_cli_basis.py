"""`ctsft basis learn` and `show`, and `ctsft tune --basis FOLDER`, as a user runs them."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import tiny
from command import assert_one_sentence, options
from ctsft.adapter.learned import Learned
from ctsft.choices import LEARNED
from ctsft.tune import learn as teaching
from ctsft.tune import trainer
from ctsft.tune.lesson import FIELDS, Lesson, make_lesson

SMALL = ["--k", "4", "--steps", "6", "--heldout", "4", "--max-length", "64", "--eval-rows", "4"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A model, and three files of rows."""
    folder = tmp_path_factory.mktemp("family")
    model, texts = tiny.save_model(folder / "llama"), []
    for word, end in (("a", "aaaa"), ("b", "bbbb"), ("c", "cccc")):
        path = folder / f"{word}.jsonl"
        tiny.save_rows(path)
        path.write_text(path.read_text().replace("aaaa", end))
        texts.append(str(path))
    return model, *texts


def begun(family, out, *more):
    return ["basis", "learn", "--model", family[0], "--data", *family[1:], *SMALL, "--out", out, *more]


@pytest.fixture(scope="module")
def learned(family, tmp_path_factory):
    """A folder of learned directions."""
    out = tmp_path_factory.mktemp("learned") / "directions"
    with pytest.MonkeyPatch.context() as patch:
        from ctsft.cli import main as cli

        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "argv", ["ctsft", *map(str, begun(family, out, "--steps", "30", "--lr", "0.02"))])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return out


# ---- learn


def test_learn_leaves_one_file_and_says_what_comes_next(ctsft, family, tmp_path):
    out = tmp_path / "my directions"
    code, told, _ = ctsft(*begun(family, out, "--steps", 30, "--lr", 0.02))
    assert code == 0 and [p.name for p in out.iterdir()] == [LEARNED]
    found = Learned.read(out)
    assert [one.name for one in found.facts.siblings] == ["a", "b", "c"]
    for one in found.facts.siblings:
        assert one.after < one.before and f"{one.before:.3f}" in told and f"{one.after:.3f}" in told
    assert [one.rows for one in found.facts.siblings] == [40, 40, 40]  # 30 steps of 4
    size = (out / LEARNED).stat().st_size
    assert f"({size / 1000:,.1f} kB)" in told
    (line,) = [line for line in told.splitlines() if line.startswith("next: ctsft ")]
    words = shlex.split(line.removeprefix("next: ctsft "))
    words[words.index("NEW.jsonl")] = family[1]
    small = ("--steps", 2, "--batch-size", 2, "--heldout", 4, "--eval-rows", 2, "--samples", 0, "--max-length", 64)
    assert ctsft(*words, *small, "--allow-worse", "--out", tmp_path / "run")[0] == 0


def test_every_field_of_the_lesson_is_an_option_with_its_true_default(ctsft):
    text = " ".join(ctsft("basis", "learn", "--help")[1].replace("│", " ").split())
    for name, default in make_lesson({"data": ["x"]}).values().items():
        option = "--target" if name == "target_modules" else f"--{name.replace('_', '-')}"
        described = Lesson.__dataclass_fields__[name].metadata["description"].replace("`", "")
        assert f" {option} " in text and all(word in text for word in described.split()), name
        _, _, after = text.partition(f" {option} ")
        if default not in (None, False, ["x"]) and name != "threads":
            assert after.split("(default: ")[1].split(")")[0] == str(default).removesuffix(".0"), name
    assert set(FIELDS) >= {"data", "by", "k", "nested"}


def test_siblings_are_the_values_of_a_column(ctsft, family, tmp_path):
    texts = {f.split("/")[-1][0]: Path(f).read_text().splitlines() for f in family[1:]}
    rows = [json.loads(line) | {"whose": whose} for whose, lines in texts.items() for line in lines]
    rows += [rows[0] | {"whose": "rare"}]
    data = tmp_path / "all.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", family[0], "--data", data, "--by", "whose", *SMALL, "--out", tmp_path / "out"]
    code, told, said = ctsft("basis", "learn", *given, "--json")
    assert code == 0 and "1 values of whose with fewer than 8 rows are left out" in said
    assert [one["name"] for one in json.loads(told)["siblings"]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--data"], ["requires an argument"]),
        ([], ["nothing to learn from; give --data"]),
        (["--data", "A", "A"], ["is named twice"]),
        (["--data", "A", "B", "--by", "prompt"], ["--by makes a sibling of every value of a column", "one file"]),
        (["--data", "A", "--by", "colour"], ["has no column colour for --by: it has prompt, completion"]),
        (["--data", "A", "--by", "prompt"], ["no value of prompt in a.jsonl has 8 rows"]),
        (["--data", "gone.jsonl"], ["There is no data 'gone.jsonl'"]),
        (["--data", "A", "--k", "33"], ["more than the 32 directions"]),
        (["--data", "A", "--steps", "0"], ["steps=0"]),
        (["--data", "A", "--resume"], ["holds no learning to resume; start one without --resume"]),
        (["--data", "A", "--resume", "--overwrite"], ["give one of them"]),
        (["--data", "A", "--out", "FOREIGN"], ["exists and holds no directions of ctsft; give another --out"]),
        (["--data", "A", "--lr", "1e30"], ["smaller rates"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_finished(ctsft, family, tmp_path, given, words):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    places = {"A": family[1], "B": family[2], "FOREIGN": tmp_path / "foreign"}
    given_as = [places.get(word, word) for word in given]
    result = ctsft("basis", "learn", "--model", family[0], "--k", 4, "--out", tmp_path / "out", *given_as)
    if given == ["--data"]:
        assert result[0] == 2 and words[0] in result[2]
    else:
        assert_one_sentence(result, *words)
    assert not (tmp_path / "out" / LEARNED).exists()
    assert "smaller rates" in words or not (tmp_path / "out").exists()
    assert os.listdir(tmp_path / "foreign") == ["thesis.tex"]


def test_a_finished_folder_is_replaced_only_on_demand(ctsft, family, tmp_path):
    out = tmp_path / "out"
    assert ctsft(*begun(family, out))[0] == 0
    first = (out / LEARNED).read_bytes()
    assert_one_sentence(ctsft(*begun(family, out)), "holds learned directions; replace it with --overwrite")
    assert_one_sentence(ctsft(*begun(family, out, "--resume")), "all is learned: ctsft basis show")
    assert ctsft(*begun(family, out, "--overwrite", "--seed", 1))[0] == 0
    assert (out / LEARNED).read_bytes() != first


# ---- stopped and resumed


def stopped_at(monkeypatch, step):
    """Learning saves after every step and is stopped after `step` of them, as by Ctrl-C; returns what undoes it."""
    from ctsft.adapter import learn

    advance = learn.State.advance
    monkeypatch.setattr(learn, "SAVE_EVERY", -1.0)

    def stops(self, *args):
        if self.step == step:
            raise KeyboardInterrupt
        return advance(self, *args)

    monkeypatch.setattr(learn.State, "advance", stops)
    return lambda: monkeypatch.setattr(learn.State, "advance", advance)


def numbers(out):
    return load_file(out / LEARNED)


def test_it_resumes_to_the_same_numbers(ctsft, family, tmp_path, monkeypatch):
    assert ctsft(*begun(family, tmp_path / "whole"))[0] == 0
    out = tmp_path / "out"
    go_on = stopped_at(monkeypatch, 3)
    code, _, told = ctsft(*begun(family, out))
    assert code == 130 and f"stopped; continue with: ctsft basis learn --resume --out {out}" in told
    assert not (out / LEARNED).exists()
    go_on()
    assert_one_sentence(ctsft(*begun(family, out)), "holds an unfinished learning; continue it with --resume, replace")
    assert_one_sentence(ctsft("basis", "learn", "--resume", "--out", out, "--k", 3), "was started with other k; resume")
    assert ctsft("basis", "learn", "--resume", "--out", out)[0] == 0
    assert [p.name for p in out.iterdir()] == [LEARNED]
    a, b = numbers(tmp_path / "whole"), numbers(out)
    assert a.keys() == b.keys() and all((a[n] == b[n]).all() for n in a)
    one, other = Learned.read(tmp_path / "whole").facts, Learned.read(out).facts
    assert one.siblings == other.siblings and one.base == other.base


@pytest.mark.parametrize("what", ["data", "weights", "state", "lesson"])
def test_what_changed_since_the_start_is_told_when_it_resumes(ctsft, family, tmp_path, monkeypatch, what):
    model, data = str(shutil.copytree(family[0], tmp_path / "llama")), str(shutil.copy(family[1], tmp_path / "a.jsonl"))
    out, mine = tmp_path / "out", (model, data, *family[2:])
    go_on = stopped_at(monkeypatch, 3)
    assert ctsft(*begun(mine, out))[0] == 130
    go_on()
    words = {
        "data": "other rows in",
        "weights": "other weights in",
        "state": "is damaged; delete it",
        "lesson": "lesson",
    }
    if what == "data":
        Path(data).write_text(Path(data).read_text() + '{"prompt": "more", "completion": "x"}\n')
    elif what == "weights":
        tensors = load_file(tmp_path / "llama" / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5
        save_file(tensors, tmp_path / "llama" / "model.safetensors", {"format": "pt"})
    elif what == "state":
        path = out / teaching.STATE
        path.write_bytes(path.read_bytes()[:-3])
    else:
        (out / teaching.LESSON).write_text("{}")
    assert_one_sentence(ctsft("basis", "learn", "--resume", "--out", out), words[what])
    assert not (out / LEARNED).exists()


def test_a_killed_learning_holds_nothing_and_goes_on(ctsft, family, tmp_path):
    """A real process at work, which others wait for, and killed by the system."""
    out = tmp_path / "out"
    code = "from ctsft.cli import main; from ctsft.adapter import learn; learn.SAVE_EVERY = 0; main.main()"
    args = begun(family, out, "--steps", 100_000)
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stderr=subprocess.DEVNULL)
    try:
        while not (out / teaching.STATE).exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert_one_sentence(ctsft(*begun(family, out)), "another process is at work in")
    finally:
        process.kill()
        process.wait()
    assert_one_sentence(ctsft(*begun(family, out)), "holds an unfinished learning")
    assert not (out / LEARNED).exists()
    (out / f".{teaching.STATE}-{'0' * 32}").write_bytes(b"half")
    assert ctsft(*begun(family, out, "--overwrite"))[0] == 0
    assert os.listdir(out) == [LEARNED]


# ---- show


def test_show_tells_what_is_in_the_file(ctsft, learned):
    code, told, _ = ctsft("basis", "show", learned)
    found = Learned.read(learned)
    assert code == 0 and found.facts.base in told and "14 matrices of" in told and "K = 4" in told
    assert all(one.name in told for one in found.facts.siblings)
    for kind, (cosine, spread) in found.agreement().items():
        assert kind in told and f"{cosine:.3f}" in told and f"0 ± {spread:.3f}" in told
    values = json.loads(ctsft("basis", "show", learned / LEARNED, "--json")[1])
    assert values["matrices"] == 14 and values["k"] == 4 and values["steps"] == 30 and len(values["siblings"]) == 3
    assert values["bytes"] == (learned / LEARNED).stat().st_size
    assert_one_sentence(ctsft("basis", "show", learned.parent), "holds no learned directions")


# ---- tune


def test_tune_along_learned_directions(ctsft, family, learned, tmp_path):
    given = ["tune", *options(family[:2], steps=6), "--basis", learned, "--lr", "0.05", "--allow-worse"]
    assert ctsft(*given, "--start", "mean", "--out", tmp_path / "run")[0] == 0
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["basis"], config["basis_file"], config["start"]) == ("learned", str(learned), "mean")
    assert str(learned) in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert str(learned) in (tmp_path / "run" / "report.html").read_text()
    held = set(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
    assert held == {"ctsft.coefficients", "ctsft.checksum"}
    assert_one_sentence(
        ctsft(*given, "--basis", tmp_path, "--out", tmp_path / "b"), "is neither a kind of basis", "basis learn makes"
    )
    assert_one_sentence(ctsft(*given, "--k", 5, "--out", tmp_path / "c"), "k=5 need")


def test_a_run_whose_shared_file_changed_is_not_resumed(ctsft, family, learned, tmp_path, monkeypatch):
    mine = shutil.copytree(learned, tmp_path / "directions")
    given = ["tune", *options(family[:2], steps=6), "--basis", mine, "--start", "mean", "--out", tmp_path / "run"]
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0.0)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                signal.raise_signal(signal.SIGINT)

    fit = trainer.CTTrainer.__init__
    monkeypatch.setattr(
        trainer.CTTrainer,
        "__init__",
        lambda self, *a, callbacks=(), **k: fit(self, *a, callbacks=[*callbacks, Stop()], **k),
    )
    assert ctsft(*given)[0] == 130
    found = Learned.read(mine)
    for a in found.siblings.values():
        a *= 2
    found.save(mine)
    assert_one_sentence(ctsft("tune", "--resume", "--out", tmp_path / "run"), "started with other directions")


def test_learn_offers_no_k_that_it_refuses(ctsft):
    text = ctsft("basis", "learn", "--help")[1]
    assert "K|PATTERN=K,..." in text and "K|PATTERN=K,...|auto" not in text
