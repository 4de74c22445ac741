"""A base that differs only in its embedding or head: the adapter loads, and that is told."""

import json
import warnings

import pytest
import torch
from peft import PeftModel

from ctsft import hotswap, save_adapter
from ctsft.adapter import store
from ctsft.adapter.store import uncovered_ends
from helpers import EMBEDDING, HEAD, SHAPES, adapt, assert_same_bits, logits, ready_config, tiny

NOTE = "the adapter was trained with another {} than this base has"

# pytest.warns hands on what it did not expect, without the module by which pyproject.toml knows it
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def retrained(part, shape="llama", **options):
    """A base of which one value of the module `part` is another."""
    base = tiny(shape, **options)
    next(m for n, m in base.named_modules() if n.endswith(part)).weight.data[0, 0] += 1
    return base


def in_silence(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(base, folder).eval()


@pytest.fixture
def saved(tmp_path):
    save_adapter(adapt(tiny(tie_word_embeddings=False)), tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_retrained_end_is_named(shape, tmp_path):
    for tied, parts in ((False, (EMBEDDING[shape], HEAD[shape])), (True, (EMBEDDING[shape],))):
        folder = tmp_path / str(tied)
        save_adapter(adapt(tiny(shape, tie_word_embeddings=tied)), folder)
        in_silence(tiny(shape, tie_word_embeddings=tied), folder)
        for part in parts:
            with pytest.warns(UserWarning, match=rf"another \S*{part}( and another \S+)? than this base has") as told:
                PeftModel.from_pretrained(retrained(part, shape, tie_word_embeddings=tied), folder)
            assert str(told[0].message).endswith(".") and "\n" not in str(told[0].message)


def test_the_same_values_in_another_dtype_are_the_same_ends(tmp_path):
    save_adapter(adapt(tiny(dtype=torch.bfloat16)), tmp_path / "a")
    in_silence(tiny(dtype=torch.bfloat16).float(), tmp_path / "a")


def test_both_ends_of_a_tied_weight_are_named_and_untying_it_changes_nothing(tmp_path):
    save_adapter(adapt(tiny()), tmp_path / "a")
    untied = tiny(tie_word_embeddings=False)
    untied.load_state_dict(tiny().state_dict())
    in_silence(untied, tmp_path / "a")
    with pytest.warns(UserWarning, match=NOTE.format("lm_head and another model.embed_tokens")):
        PeftModel.from_pretrained(retrained("embed_tokens"), tmp_path / "a")


def test_position_embeddings_are_ends_too(tmp_path):
    save_adapter(adapt(tiny("gpt2")), tmp_path / "a")
    with pytest.warns(UserWarning, match=NOTE.format("transformer.wpe")):
        PeftModel.from_pretrained(retrained("wpe", "gpt2"), tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, ["lm_head", "model.embed_tokens"]),
        ({"target_modules": ["q_proj", "lm_head"]}, ["model.embed_tokens"]),
        ({"modules_to_save": ["lm_head"]}, ["model.embed_tokens"]),
        ({"basis": "universal"}, []),
    ],
    ids=str,
)
def test_what_the_fingerprint_covers_or_the_adapter_brings_is_left_out(options, left, tmp_path):
    model = adapt(tiny(tie_word_embeddings=False), **options)
    save_adapter(model, tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert sorted(settings["uncovered_ends"]) == left
    model.add_adapter("second", ready_config(model.get_base_model(), **options))  # on layers that are there already
    assert model.peft_config["second"].uncovered_ends == settings["uncovered_ends"]
    in_silence(tiny(tie_word_embeddings=False), tmp_path / "a")


def test_a_quantised_head_is_another_one(saved):
    base = tiny(tie_word_embeddings=False)
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.warns(UserWarning, match=NOTE.format("lm_head")):
        PeftModel.from_pretrained(base, saved)


def test_an_end_that_is_not_here_is_not_compared(saved):
    base = tiny(tie_word_embeddings=False)
    base.lm_head.to("meta")
    in_silence(base, saved)


def test_wrapped_names_are_the_same(saved):
    in_silence(torch.compile(tiny(tie_word_embeddings=False), backend="eager"), saved)
    base = torch.compile(retrained("lm_head", tie_word_embeddings=False), backend="eager")
    with pytest.warns(UserWarning, match=NOTE.format("lm_head")):
        PeftModel.from_pretrained(base, saved)


def test_a_swap_compares_them_too(saved):
    model = adapt(retrained("lm_head", tie_word_embeddings=False))
    with pytest.warns(UserWarning, match=NOTE.format("lm_head")):
        hotswap(model, saved)


def test_an_older_adapter_says_nothing_and_hashes_nothing(saved, monkeypatch):
    file = saved / "adapter_config.json"
    hidden = ("uncovered_ends", "settings_hash", "tensors_hash")
    file.write_text(json.dumps({n: v for n, v in json.loads(file.read_text()).items() if n not in hidden}))
    monkeypatch.setattr(store, "ends", None)  # would raise
    with pytest.warns(UserWarning, match="saved by an older ctsft") as told:
        model = PeftModel.from_pretrained(retrained("lm_head", tie_word_embeddings=False), saved).eval()
    assert len([w for w in told if w.category is UserWarning]) == 1
    assert_same_bits(logits(model), logits(retrained("lm_head", tie_word_embeddings=False)))


def test_every_weight_is_hashed_once(monkeypatch):
    hashed = []
    real = store.fingerprint
    monkeypatch.setattr(store, "fingerprint", lambda weights: real(hashed.extend(pairs := list(weights)) or pairs))
    base = tiny()
    found = uncovered_ends(base, ready_config(base), {})
    assert found["lm_head"] == found["model.embed_tokens"] and len(hashed) == 1
