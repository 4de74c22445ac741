import pytest

from ctsft.errors import CTError
from ctsft.lab.claims import applicable, expanded, lacking, read_claims
from ctsft.lab.experiments import PAPERS
from synthetic import claim, laboratory

CLAIMS = read_claims(PAPERS / "claims.toml")
K = {"k": [2, 4, 8, 16]}


def test_a_selection_multiplies_out_its_lists_and_computes_its_steps():
    assert expanded({"k": [2, 32], "steps": "1280/k"}) == [{"k": 2, "steps": 640}, {"k": 32, "steps": 40}]


def test_a_schedule_brings_its_k():
    assert expanded({"schedule": "8>16@1/2"}) == [{"schedule": "8>16@1/2", "k": 8}]


def test_the_file_has_enough_claims():
    papers = {one.source for one in CLAIMS}
    assert papers == {"76", "78", "81", "82", "83", "84", "85", "86", "87", "88", "89", "derived", "ours"}
    assert sum(one.source not in ("ours", "derived") for one in CLAIMS) >= 40
    assert all(one.protocol == "honest" for one in CLAIMS)


GOOD = """
[[claim]]
id = "1"
source = "81"
text = "It is so."
experiments = ["81"]
predicate = "less"
metric = "train_loss"
a = { k = 32 }
b = { k = 2 }
effect = 0.02
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("b = { k = 2 }", ""), "1: all: Value error, the predicate less needs b"),
        (("b = {", "number = 3\nb = {"), "the predicate less has no number"),
        (("k = 32", "kk = 32"), "a selection cannot have kk"),
        (("k = 32", "seed = 1"), "a selection cannot have seed"),
        (("k = 32", "k = -1"), "k: Input should be greater than or equal to 0"),
        (("k = 32", "steps = '9/m'"), "steps '9/m' is no number"),
        (("k = 32", "schedule = '8-16'"), "the schedule '8-16' is not like"),
        (("train_loss", "training_loss"), "there is no metric 'training_loss'"),
        (("effect = 0.02", ""), "1: effect: Field required"),
        (("effect", "efect"), "1: effect: Field required; efect: Extra inputs are not permitted"),
        (("less", "fewer"), "1: predicate: Input should be"),
        (("effect = 0.02", "effect = 0.02\nartefact = { cause = 'c', control = { metric = 'm' } }"), "no metric 'm'"),
        (("effect = 0.02", "effect = 0.02" + GOOD), "1: the id is used 2 times"),
        (("[[claim]]", "[[claims]]"), "claims: no such table"),
        (("[[claim]]", "[[claim"), "is no TOML"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, change, message):
    path = tmp_path / "claims.toml"
    path.write_text(GOOD)
    assert read_claims(path)[0].b == ({"k": 2},)
    path.write_text(GOOD.replace(*change))
    with pytest.raises(CTError) as error:
        read_claims(path)
    assert message in str(error.value)


def test_every_wrong_claim_is_told_at_once(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text(GOOD.replace("effect", "efect") + GOOD.replace('"1"', '"2"').replace("less", "fewer"))
    with pytest.raises(CTError, match=r"1: .*efect: Extra.*2: predicate"):
        read_claims(path)
    with pytest.raises(CTError, match="cannot be read"):
        read_claims(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"predicate": "best", "a": K, "along": "k", "value": 3, "mode": "min"}, "value 3 is not among"),
        ({"predicate": "ordered", "a": {"k": 2}, "along": "k", "direction": "falls"}, "two or more values of k"),
        (
            {"predicate": "ordered", "a": {"k": [2, 4]}, "along": "k", "direction": "falls", "gains": "step"},
            "two or more values of k",
        ),
        ({"predicate": "slope", "a": {"k": [2, 4]}, "along": "k", "law": "power", "number": 1}, "three arms or more"),
        ({"predicate": "crossover", "metric": "cosine", "b": {"k": 2}, "budgets": [1, 2]}, "a crossover is of"),
        ({"predicate": "exact", "number": 1, "per": "kk"}, "there is no field 'kk'"),
    ],
)
def test_a_claim_that_says_nothing_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        claim(**values)


# ------------------------------------------------------------------------------------------- on a user's own model


def test_a_claim_is_asked_of_the_users_model_and_text():
    one = claim("less", where={"text": "sql", "steps": 5}, a={"k": 4}, b=[{"k": 2}, {"k": 8, "text": "other"}])
    (asked,), aside = applicable([one], ["x"], "my/model", "my.txt")
    assert aside == {}
    assert asked.where == {"steps": 5, "model": "my/model", "text": "my.txt"}
    assert (asked.a, asked.b) == ({"k": 4}, ({"k": 2}, {"k": 8}))
    (asked,), _ = applicable([one], ["x"], "my/model")  # no text: each keeps its own
    assert asked.where["text"] == "sql" and asked.b[1] == {"k": 8, "text": "other"}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"experiments": ["x", "y"]}, "experiment y was not run"),
        ({"source": "derived"}, "it is arithmetic on the papers' figures"),
        ({"where": {"model": "tinyllama-1.1b"}}, "it is about tinyllama-1.1b"),
        ({"a": {"model": ["photonic", "stories15m"], "k": 4}}, "it is about photonic, stories15m"),
        ({"where": {"model": "tinyllama-1.1b"}, "any_model": True}, None),
        ({"predicate": "near", "number": 7.8}, "its number, 7.8, was measured on the model of its source"),
        ({"predicate": "near", "number": 0.0}, None),
        ({"predicate": "above", "number": 0.999}, None),
        ({"predicate": "exact", "number": 33, "per": "k"}, "its number, 33, was measured on the model of its source"),
    ],
)
def test_why_a_claim_cannot_be_asked_of_another_model(values, reason):
    given = {"predicate": "less", "a": {"k": 4}} | values
    b = {"b": {"k": 2}} if given["predicate"] == "less" else {}
    asked, aside = applicable([claim(**given | b)], ["x"], "my/model")
    assert aside == ({} if reason is None else {"1": reason})
    assert (asked[0].where.get("model") == "my/model") == (reason is None)


def test_two_claims_that_become_one_question_are_asked_once():
    one, other = (
        claim("less", id=name, where={"model": name}, a={"k": 4}, b={"k": 2}, any_model=True) for name in ("p", "q")
    )
    assert applicable([one, other], ["x"], "my/model")[1] == {"q": "of another model it asks the same as p"}


def test_the_arena_and_88_have_claims_for_any_model():
    asked, aside = applicable(CLAIMS, ["arena", "88"], "my/model", "my.txt")
    assert [one.id for one in asked] == [one.id for one in CLAIMS]
    assert all(one.control().where["model"] == "my/model" for one in asked if one.artefact and one.id not in aside)
    left = {one.id for one in asked if one.id not in aside}
    assert left == {
        *("87.4", "88.1", "88.2", "88.3", "88.4", "88.6", "ours.1", "ours.2", "ours.4", "ours.5", "ours.6", "ours.7"),
        "ours.10",
    }


def test_a_claim_that_needs_an_arm_which_is_left_out_is_told():
    lab = laboratory({"k": [2, 4]}, {"k": 8, "profiles": ["long"]}, {"k": 2, "method": "lora"})
    sizes = {name: lab.profiles["full"] for name in ("full", "long")}
    lab = lab.model_copy(update={"profiles": sizes})
    both, long, control, lora = (
        claim("less", id="both", a={"k": 4}, b={"k": 2}),
        claim("less", id="long", a={"k": 4}, b={"k": [2, 8]}),
        claim("less", id="control", a={"k": 4}, b={"k": 2}, artefact={"cause": "", "control": {"b": {"k": 16}}}),
        claim("less", id="lora", where={"method": "lora"}, a={"k": 4}, b={"k": 2}),
    )
    assert lacking([both, long, control, lora], lab, "full") == {
        "long": "it needs an arm that is left out here (k 8)",
        "control": "it needs an arm that is left out here (k 16)",
        "lora": "it needs an arm that is left out here (method lora, k 4)",
    }
    assert set(lacking([both, long], lab, "long")) == set()


def test_a_claim_for_any_model_tells_of_which_it_was_asked_but_not_one_s_own():
    (theirs,) = [one for one in CLAIMS if one.id == "ours.1"]
    mine = {one.id: one for one in applicable(CLAIMS, ["arena"], "/m/mine", "/t/my.txt")[0]}["ours.1"]
    assert theirs.told == theirs.text.removesuffix(".") + " (stories15m, shakespeare)."
    assert mine.where["model"] == "/m/mine" and mine.told == mine.text == theirs.text


def test_a_claim_for_any_model_names_none_in_its_sentence():
    told = [one.text.lower() for one in CLAIMS if one.any_model]
    assert told and not [text for text in told if any(w in text for w in ("llama", "smollm", "stories", "width"))]
