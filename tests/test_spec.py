import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctsft.lab.spec import PAPER_LR, Spec, replaced


def test_a_key_is_golden():
    """A changed key orphans every record that is committed; change FORMAT with it."""
    assert Spec().key == "photonic-diagonal-k32-1349cde127705c16"
    spec = Spec(model="~/models/TinyLlama-1.1b", k=8, schedule="8>16@1/2", evaluate=(10, 20), probes=("coverage",))
    assert spec.key == "tinyllama-1.1b-diagonal-k8-56760584280c1963"


CHANGES = {
    "model": "stories15m",
    "tied": False,
    "text": "shakespeare",
    "method": "core",
    "k": 16,
    "basis": "random",
    "weight_from": "bottom",
    "universal_mode": "replace",
    "siblings": ("sql", "shakespeare"),
    "learning": "nested",
    "learned_k": 64,
    "learned_steps": 320,
    "learned_batch": 4,
    "learned_pace": 3.0,
    "start": "mean",
    "strength": 2.0,
    "rule": "auto",
    "shuffled": True,
    "allocation": "effective_rank",
    "targets": "blocks",
    "schedule": "32>16@1/2",
    "carry": True,
    "refreshes": 2,
    "dropout": 0.1,
    "batches": "fresh",
    "batch": 3,
    "length": 64,
    "steps": 41,
    "decay": "linear",
    "lr": 6e-3,
    "dtype": "bfloat16",
    "evaluate": (5,),
    "probes": ("coverage",),
    "probe_every": 5,
    "heldout_windows": 126,
    "ablate": True,
    "seed": 1,
    "weights": "xxh3-1",
    "corpus": "xxh3-2",
}


def test_every_field_is_in_the_key():
    assert set(CHANGES) == set(Spec.model_fields)
    keys = [Spec(**{name: value}).key for name, value in CHANGES.items()]
    assert len({Spec().key, *keys}) == len(CHANGES) + 1


@settings(max_examples=200)
@given(st.sets(st.sampled_from(sorted(CHANGES))), st.sets(st.sampled_from(sorted(CHANGES))))
def test_keys_are_equal_exactly_where_specs_are(these, those):
    def spec(names):
        return Spec(**{n: CHANGES[n] for n in names if n != "schedule" or "k" not in names})

    a, b = spec(these), spec(those)
    assert (a.key == b.key) == (a == b)
    assert Spec(**json.loads(json.dumps(a.model_dump(mode="json")))) == a


def test_a_default_in_words_does_not_move_the_key():
    assert Spec(k=32, lr=PAPER_LR, steps=40, dropout=0).key == Spec().key
    assert Spec(lr=1).key == Spec(lr=1.0).key


def test_a_schedule_and_its_k_must_agree():
    with pytest.raises(ValueError, match=r"k=32 is not the first K of the schedule 8>16@1/2"):
        Spec(schedule="8>16@1/2")


def test_a_model_and_text_of_one_s_own_count_by_name_and_content_wherever_they_lie():
    """Two models of one folder name have keys of their own, and a folder that has moved keeps its records."""
    mine = Spec(model="/a/mine", weights="xxh3-1", text="/a/words.txt", corpus="xxh3-2")
    assert mine.key.startswith("mine-diagonal-k32-")
    assert replaced(mine, model="/b/mine", text="/b/words.txt").key == mine.key
    others = [{"weights": "xxh3-3"}, {"corpus": "xxh3-3"}, {"model": "/a/other"}, {"text": "/a/other.txt"}]
    assert len({mine.key, *(replaced(mine, **other).key for other in others)}) == 5
    assert Spec(model="/a/mine").key != Spec(model="/b/mine").key  # not a user's own: the name is all there is
