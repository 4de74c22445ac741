"""A comparison in a folder: what it leaves, going on after a stop, and whose folder it is."""

import json

import pytest
import torch
import torch.nn.functional as F

import ctsft
import tiny
from command import files  # noqa: F401
from contests import trial
from ctsft import CTError
from ctsft.adapter.learned import Facts, Learned
from ctsft.plan import compare as comparing
from ctsft.plan.arms import candidate
from ctsft.plan.compare import Lines, compare, key_of
from ctsft.plan.contest import read_contest
from ctsft.plan.record import Comparison, Trial
from ctsft.plan.trial import Bench

ARMS = ["diagonal-4", "lora-1", "norms"]
SMALL = {"arms": ARMS, "seeds": 2, "steps": 4, "batch_size": 4, "heldout": 8, "eval_rows": 4, "max_length": 64}
WRITTEN = {"contest.json", "sources.json", "trials.jsonl", "rates.jsonl", "comparison.json", "comparison.html"}


@pytest.fixture(scope="module")
def options(files):  # noqa: F811
    return {"model": files[0], "data": files[1], **SMALL}


@pytest.fixture(scope="module")
def done(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "done"
    return compare(out, **options), out


def judged(found):
    """All of a comparison but what depends on the clock."""
    values = found.model_dump(exclude={"created"})
    for arm in values["arms"]:
        for one in arm["trials"]:
            del one["clock"]
    return values


def test_every_arm_is_trained_on_every_seed_at_the_best_of_its_races(done, options):
    found, out = done
    assert {p.name for p in out.iterdir()} == WRITTEN
    assert Comparison.model_validate_json((out / "comparison.json").read_bytes()) == found
    assert ctsft.compare is compare and [arm.name for arm in found.arms] == ARMS
    kept = [Trial.model_validate_json(line) for line in (out / "trials.jsonl").read_bytes().splitlines()]
    for arm in found.arms:
        races = {t.rate: t.heldout for t in kept if t.candidate == arm.name and t.seed == 0}
        assert {rate: looks[-1][1] for rate, looks in races.items()} == dict(arm.tried)
        assert {len(looks) for looks in races.values()} == {1} and arm.rule in races and len(races) >= 3
        assert arm.rate == min(arm.tried, key=lambda pair: pair[1])[0]
        assert [t.seed for t in arm.trials] == [1, 2] and all(t in kept for t in arm.trials)
        assert {(t.rate, t.steps, tuple(s for s, _ in t.heldout)) for t in arm.trials} == {
            (arm.rate, 4, (0, 1, 2, 3, 4))
        }
        assert {t.heldout[0][1] for t in arm.trials} == {found.before} and arm.trials[0].end < found.before
    first = [[t.train[0] for t in arm.trials] for arm in found.arms]
    assert first[0] == first[1] == first[2] and first[0][0] != first[0][1]  # the same batches, other ones for each seed


def test_stopped_anywhere_it_goes_on_to_the_same_numbers(done, options, tmp_path, monkeypatch):
    original, made = Bench.trial, []

    def trial(self, *args, **kwargs):
        if len(made) in (2, 11) and stops:
            stops.pop()
            raise KeyboardInterrupt
        made.append(args)
        return original(self, *args, **kwargs)

    stops = [1, 1]
    monkeypatch.setattr(Bench, "trial", trial)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "stopped", **options)
    assert {p.name for p in (tmp_path / "stopped").iterdir()} == WRITTEN - {"comparison.json", "comparison.html"}
    with (tmp_path / "stopped" / "trials.jsonl").open("a") as file:
        file.write('{"candidate": "norms", "se')  # of a line that was being written
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "stopped", resume=True, **options)
    found = compare(tmp_path / "stopped", resume=True, **options)
    assert judged(found) == judged(done[0])
    assert len({(a[0], a[1], a[3]) for a in made}) == len(made)  # nothing was trained twice


def test_more_arms_and_seeds_can_be_asked_for_later(options, tmp_path, monkeypatch):
    few = options | {"arms": ["norms"], "seeds": 1, "rates": "rule"}
    first = compare(tmp_path / "out", **few)
    assert first.arms[0].tried == [] and first.arms[0].rate == first.arms[0].rule
    made, original = [], Bench.trial
    monkeypatch.setattr(
        Bench,
        "trial",
        lambda self, c, seed, *a, **k: (made.append((c.name, seed)), original(self, c, seed, *a, **k))[1],
    )
    more = compare(tmp_path / "out", resume=True, **few | {"arms": ["diagonal-2", "norms"], "seeds": 2})
    assert made == [("diagonal-2", 1), ("diagonal-2", 2), ("norms", 2)]
    assert more.arms[1].trials[0] == first.arms[0].trials[0] and len(more.arms[1].trials) == 2
    more = compare(tmp_path / "out", resume=True, **few | {"arms": ["lora-1"], "seeds": 2})
    assert made[3:] == [("lora-1", 1), ("lora-1", 2)] and [a.name for a in more.arms] == [
        "lora-1",
        "diagonal-2",
        "norms",
    ]
    with pytest.raises(CTError, match="k=400 is more"):  # what failed is not asked for ever after
        compare(tmp_path / "out", resume=True, **few | {"arms": ["diagonal-400"]})
    assert [a.name for a in compare(tmp_path / "out", resume=True, **few).arms] == ["norms", "lora-1", "diagonal-2"]
    with pytest.raises(CTError, match="started with other steps; resume it without giving them"):
        compare(tmp_path / "out", resume=True, **few | {"steps": 5})


def test_full_races_are_as_long_as_trials(options, tmp_path):
    found = compare(tmp_path, **options | {"arms": ["norms"], "seeds": 1, "steps": 12, "rates": "full"})
    assert found.arms[0].race_steps == 12
    found = compare(tmp_path, overwrite=True, **options | {"arms": ["norms"], "seeds": 1, "steps": 12})
    assert found.arms[0].race_steps == 10
    assert {p.name for p in tmp_path.iterdir()} == WRITTEN


def test_a_folder_that_is_not_ours_and_one_that_is(done, options, tmp_path):
    with pytest.raises(CTError, match="holds a comparison; continue it with --resume"):
        compare(done[1], **options)
    with pytest.raises(CTError, match="holds no comparison to resume"):
        compare(tmp_path / "new", resume=True, **options)
    (tmp_path / "mine.txt").write_text("mine")
    for chosen in ({}, {"overwrite": True}):
        with pytest.raises(CTError, match="exists and is no comparison of ctsft"):
            compare(tmp_path, **options, **chosen)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_what_an_arm_cannot_do_shows_before_anything_trains(options, tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "trial", None)
    with pytest.raises(CTError, match="k=400 is more than the 32 directions"):
        compare(tmp_path / "out", **options | {"arms": ["norms", "diagonal-400"]})
    assert not (tmp_path / "out").exists()


def test_other_rows_are_not_the_same_comparison(done, options, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": " a"}) + "\n" for i in range(30)))
    small = options | {"data": str(rows), "arms": ["norms"], "seeds": 1, "rates": "rule"}
    compare(tmp_path / "out", **small)
    rows.write_text(rows.read_text().replace("7", "8"))
    with pytest.raises(CTError, match="was started with other rows in"):
        compare(tmp_path / "out", resume=True, **small)


def test_trials_along_other_directions_are_not_counted_together(options, tmp_path):
    def learned(seed):
        names = [f"model.layers.{i}.mlp.{m}_proj" for i in (0, 1) for m in ("up", "down")]
        names += [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in "qkvo"]
        names += [f"model.layers.{i}.mlp.gate_proj" for i in (0, 1)]
        sides = {n: (32, 48) if "down" in n else (48, 32) if "mlp" in n else (32, 32) for n in names}
        draw = torch.Generator().manual_seed(seed)
        u = {n: F.normalize(torch.randn(d, 4, generator=draw), dim=0) for n, (d, _) in sides.items()}
        vh = {n: F.normalize(torch.randn(4, d, generator=draw), dim=1) for n, (_, d) in sides.items()}
        facts = Facts(siblings=[], base="b", model="m", k=4, steps=1, batches=1, rates=[1.0], nested=False, seed=seed)
        Learned(u, vh, {}, facts).save(tmp_path)

    learned(0)
    small = options | {"arms": [f"diagonal-4@{tmp_path}"], "seeds": 1, "rates": "rule"}
    first = compare(tmp_path / "out", **small)
    more = compare(tmp_path / "out", resume=True, **small | {"seeds": 2})
    assert more.arms[0].trials[0] == first.arms[0].trials[0]
    learned(1)
    with pytest.raises(CTError, match=r"^the trials of diagonal-4@.* are not from the directions that its file now"):
        compare(tmp_path / "out", resume=True, **small | {"seeds": 3})


def test_the_default_arms_take_all_directions_that_there_are_where_these_are_fewer(options, tmp_path):
    rest = {name: value for name, value in options.items() if name != "arms"}
    found = compare(tmp_path / "out", **rest | {"seeds": 1, "steps": 1, "rates": "rule"})
    assert [a.name for a in found.arms] == ["diagonal-32", "gains-32", "lora-1", "lora-8", "vera-256", "norms"]
    assert found.contest["arms"] == read_contest(tmp_path / "out" / "contest.json").arms == [a.name for a in found.arms]


def test_answers_are_scored_where_there_are_questions(options, tmp_path, monkeypatch):
    wide = tiny.save_model(tmp_path / "wide", context=1024)
    monkeypatch.setattr(comparing, "answers", lambda model, t, corpus, prompts, *a: ([], [], scored(len(prompts))))

    def scored(total):
        return comparing.Accuracy(correct=1, total=total, low=0, high=1)

    small = options | {
        "model": wide,
        "data": "sql:bakery",
        "limit": 8,
        "arms": ["norms"],
        "rates": "rule",
        "max_length": 1024,
    }
    found = compare(tmp_path / "out", **small, questions=3)
    assert found.before_accuracy.total == 3 and {t.accuracy.total for t in found.arms[0].trials} == {3}
    found = compare(tmp_path / "none", **small | {"seeds": 1}, questions=0)
    assert found.before_accuracy is None and found.arms[0].trials[0].accuracy is None


def test_lines_are_on_disk_at_once_and_damage_is_told(tmp_path):
    path = tmp_path / "trials.jsonl"
    lines = Lines(path, Trial, key_of)
    first = lines.add(trial("norms", 1, (4.0, 3.0, 2.0)))
    assert Lines(path, Trial, key_of) == {("norms", 1, 0.1, 8): first}
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(CTError, match=r"trials\.jsonl is damaged in line 1 .*delete that line"):
        Lines(path, Trial, key_of)
    assert candidate(first.candidate).method == "norms"
