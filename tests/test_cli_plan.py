import json
import re

import pytest

from command import assert_one_sentence, options
from ctsft.files import read_json
from ctsft.plan import automatic as by_plan
from ctsft.plan import plan as plans
from ctsft.plan.told import read_plan
from ctsft.tune import run as train
from ctsft.tune.recipe import read_recipe
from tiny import WORDS

SMALL = "--steps 12 --batch-size 4 --heldout 10 --max-length 64 --arms diagonal-2 --arms diagonal-8 --arms lora-1"


@pytest.fixture(scope="module")
def asked(files):
    return ["--model", files[0], "--data", files[1], *SMALL.split()]


def test_a_plan_is_told_and_kept(ctsft, asked, tmp_path):
    code, out, _ = ctsft("plan", *asked, "--out", tmp_path / "new" / "p")
    found = read_plan(tmp_path / "new" / "p" / "plan.json")
    assert code == 0
    for o in found.options:
        assert re.search(rf"{o.candidate}\s.*{o.trained:,}\s.*{o.loss:.3f}\s.*{o.low:.2f} to {o.high:.2f}", out)
    assert found.decision.why[0] in " ".join(out.split())
    assert found.tune in out
    page = (tmp_path / "new" / "p" / "plan.html").read_text()
    assert page.count("<svg") == 2 and "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert all(o.candidate in page for o in found.options) and found.tune.split(" --data")[0] in page


def test_json_is_the_whole_plan_and_nothing_is_written(ctsft, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = ctsft("plan", *asked, "--json")
    assert code == 0 and {o["candidate"] for o in json.loads(out)["options"]} == {"diagonal-2", "diagonal-8", "lora-1"}
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_sentence(ctsft, asked, tmp_path):
    assert_one_sentence(ctsft("plan", *asked, "--budget", "much"), "--budget 'much'", "15 min")
    assert_one_sentence(ctsft("plan", *asked, "--arms", "lorra"), "no arm 'lorra'")
    (tmp_path / "file").write_text("")
    assert_one_sentence(ctsft("plan", *asked, "--out", tmp_path / "file"), "is no folder")
    assert_one_sentence(ctsft("plan", "--steps", "0"), "steps")


def test_a_file_that_is_no_plan_is_told(tmp_path):
    from ctsft.errors import CTError

    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(CTError, match="is no plan of this ctsft"):
        read_plan(tmp_path / "plan.json")


def learned(ctsft, files, folder):
    """Eight directions in folder `d`."""
    (folder / "my.txt").write_text("".join(f"{w} is a colour, and a word.\n\n" for w in WORDS * 40))
    learn = ["basis", "learn", "--model", files[0], "--data", files[1], folder / "my.txt", "--steps", "2", "--k", "8"]
    assert ctsft(*learn, "--out", folder / "d")[0] == 0


def test_learned_directions_at_hand_are_weighed_at_the_k_they_have(ctsft, files, tmp_path):
    learned(ctsft, files, tmp_path)
    asked = ["--model", files[0], "--data", files[1], "--steps", "6", "--batch-size", "2", "--heldout", "10"]
    code, out, _ = ctsft("plan", *asked, "--arms", "lora-1", "--basis", tmp_path / "d", "--json")
    found = json.loads(out)
    assert code == 0
    assert [o["candidate"] for o in found["options"]] == [f"diagonal-{k}@{tmp_path / 'd'}" for k in (4, 8)] + ["lora-1"]
    assert f"--basis {tmp_path / 'd'}" in found["tune"]
    assert_one_sentence(ctsft("plan", *asked, "--basis", tmp_path / "none"), "neither a kind of basis", "none")


# ---- ctsft tune --k auto, and without --k


def automatic(files, *more):
    words = options(files)
    words[words.index("--k") + 1] = "auto"
    return [*words, *more, "--allow-worse"]


def unsaid(files, *more):
    words = options(files)
    at = words.index("--k")
    return [*words[:at], *words[at + 2 :], *more, "--allow-worse"]


def test_k_auto_is_chosen_before_the_run_and_kept_by_resume(ctsft, files, tmp_path, monkeypatch):
    code, _, err = ctsft("tune", *automatic(files), "--form", "gains", "--out", tmp_path / "r")
    assert code == 0
    recipe, found = read_recipe(tmp_path / "r" / "recipe.json"), read_plan(tmp_path / "r" / "plan.json")
    assert [o.candidate.split("-")[0] for o in found.options] == ["gains"] * 3
    assert recipe.k == int(found.decision.candidate.split("-")[1]) and recipe.form == "gains"
    assert recipe.lr == (found.chosen.rate if found.chosen.again else "auto")
    assert found.decision.why[0] in " ".join(err.split())
    assert read_json(tmp_path / "r" / "run.json")["recipe"]["k"] == recipe.k

    monkeypatch.setattr(plans, "answered", None)  # whoever plans now fails
    monkeypatch.setattr(by_plan, "answered", None)
    (tmp_path / "r" / "run.json").unlink()
    code, _, err = ctsft("tune", "--resume", "--k", "auto", "--out", tmp_path / "r", "--allow-worse")
    assert code == 0 and read_recipe(tmp_path / "r" / "recipe.json") == recipe


def test_a_plan_is_in_the_folder_before_anything_is_measured(ctsft, files, tmp_path, monkeypatch):
    def die(*_):
        raise SystemExit(9)  # as a kill, nothing that comes after it is done

    with monkeypatch.context() as patch:
        patch.setattr(train, "measured_before", die)
        assert ctsft("tune", *automatic(files), "--form", "diagonal", "--out", tmp_path / "r")[0] == 9
    found = read_plan(tmp_path / "r" / "plan.json")
    code, out, _ = ctsft("tune", "--resume", "--out", tmp_path / "r", "--allow-worse")
    assert code == 0 and f"plan {tmp_path / 'r' / 'plan.html'}" in out
    assert read_plan(tmp_path / "r" / "plan.json") == found and (tmp_path / "r" / "plan.html").exists()


def test_without_k_a_long_training_is_planned_over_both_forms(ctsft, files, tmp_path, monkeypatch):
    monkeypatch.setattr(by_plan, "WORTH", 0.0)
    code, out, _ = ctsft("tune", *unsaid(files), "--out", tmp_path / "r")
    assert code == 0 and (tmp_path / "r" / "plan.html").exists() and str(tmp_path / "r" / "plan.html") in out
    recipe, found = read_recipe(tmp_path / "r" / "recipe.json"), read_plan(tmp_path / "r" / "plan.json")
    assert {o.candidate for o in found.options} == {"diagonal-4", "diagonal-16", "diagonal-32", "gains-32"}
    assert f"{recipe.form}-{recipe.k}" == found.decision.candidate

    told = ["--k", recipe.k, "--form", recipe.form, "--lr", recipe.lr]  # the same by hand, on a model freshly loaded
    assert ctsft("tune", *unsaid(files), *told, "--out", tmp_path / "s")[0] == 0
    one, two = (read_json(tmp_path / name / "run.json") for name in "rs")
    assert [one[n] for n in ("before", "after", "recipe")] == [two[n] for n in ("before", "after", "recipe")]
    assert [p["loss"] for p in one["curve"]] == [p["loss"] for p in two["curve"]]

    assert ctsft("tune", *unsaid(files), *told, "--out", tmp_path / "r", "--overwrite")[0] == 0
    assert not (tmp_path / "r" / "plan.json").exists()  # a run of another K is not of this plan


def test_without_k_a_form_and_a_rate_that_are_given_stay(ctsft, files, tmp_path, monkeypatch):
    monkeypatch.setattr(by_plan, "WORTH", 0.0)
    given = ["--form", "diagonal", "--lr", "0.01", "--out", tmp_path / "r"]
    assert ctsft("tune", *unsaid(files), *given)[0] == 0
    recipe, found = read_recipe(tmp_path / "r" / "recipe.json"), read_plan(tmp_path / "r" / "plan.json")
    assert {o.candidate.split("-")[0] for o in found.options} == {"diagonal"}
    assert (recipe.form, recipe.lr) == ("diagonal", 0.01)


def test_without_k_a_short_training_takes_64_or_all_that_there_are(ctsft, files, tmp_path, monkeypatch):
    monkeypatch.setattr(by_plan, "answered", None)
    code, _, err = ctsft("tune", *unsaid(files), "--out", tmp_path / "r")
    assert code == 0 and "K is 32: training takes about" in err and "too little to plan for" in err
    assert read_recipe(tmp_path / "r" / "recipe.json").k == 32 and not (tmp_path / "r" / "plan.json").exists()


def test_without_k_what_plans_do_not_know_takes_64_or_all_that_there_are(ctsft, files, tmp_path, monkeypatch):
    monkeypatch.setattr(by_plan, "WORTH", 0.0)
    told = ctsft("tune", *unsaid(files), "--target", "q_proj", "--out", tmp_path / "r")
    assert told[0] == 0 and "K is 32: plans know nothing of target_modules" in told[2]
    assert read_recipe(tmp_path / "r" / "recipe.json").k == 32


def test_without_k_learned_directions_are_all_used(ctsft, files, tmp_path, monkeypatch):
    learned(ctsft, files, tmp_path)
    assert ctsft("tune", *unsaid(files), "--basis", tmp_path / "d", "--out", tmp_path / "r")[0] == 0
    assert read_recipe(tmp_path / "r" / "recipe.json").k == 8
    monkeypatch.setattr(by_plan, "WORTH", 0.0)
    assert ctsft("tune", *unsaid(files), "--basis", tmp_path / "d", "--out", tmp_path / "s")[0] == 0
    names = [o.candidate for o in read_plan(tmp_path / "s" / "plan.json").options]
    assert sorted(names) == [f"{arm}@{tmp_path / 'd'}" for arm in ("diagonal-4", "diagonal-8", "gains-8")]


def test_k_auto_says_what_it_cannot_plan(ctsft, files, tmp_path):
    told = ctsft("tune", *automatic(files), "--target", "q_proj", "--out", tmp_path / "r")
    assert_one_sentence(told, "--k auto", "target_modules")
    assert not (tmp_path / "r").exists()


def test_a_folder_is_refused_before_anything_is_planned(ctsft, files, finished, monkeypatch):
    monkeypatch.setattr(by_plan, "automatic", None)
    for words in (automatic(files), unsaid(files)):
        assert_one_sentence(ctsft("tune", *words, "--out", finished), "holds a run that is finished")
