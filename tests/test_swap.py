"""A file that is loaded onto an adapter that is there already is checked like any other."""

import json

import peft.config
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

import ctsft
from ctsft import CTError, save_adapter
from helpers import adapt, assert_same_bits, logits, randomise, tiny

# pytest.warns hands on what it did not expect, without the module by which pyproject.toml knows it
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FILE = "adapter_model.safetensors"


def base(**options):
    return tiny(tie_word_embeddings=False, **options)


def save(folder, seed=5, **options):
    """Save an adapter with random numbers in `folder`; its logits."""
    model = randomise(adapt(base(), **options), seed=seed)
    for module in model.modules():
        if "default" in (getattr(module, "modules_to_save", None) or {}):
            module.modules_to_save["default"].weight.data.mul_(1 + seed)
    save_adapter(model, folder)
    return logits(model)


def damage(folder):
    tensors = load_file(folder / FILE)
    tensors["ctsft.coefficients"][3] += 1
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


OPTIONS = [
    {},
    {"basis": "gradient"},
    {"modules_to_save": ["lm_head"], "store_basis": True},
    {"k": {"q_proj": 2, ".*": 3}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_adapter_that_is_there_takes_the_file_s_numbers(options, tmp_path):
    save(tmp_path / "one", **options)
    wanted = save(tmp_path / "two", seed=6, **options)
    model = PeftModel.from_pretrained(base(), tmp_path / "one").eval()
    model.load_adapter(str(tmp_path / "two"), "default")
    assert_same_bits(logits(model), wanted)
    fresh = adapt(base(), **options)
    fresh.load_adapter(tmp_path / "two", adapter_name="default", is_trainable=True)
    assert_same_bits(logits(fresh.eval()), wanted)
    save_adapter(fresh, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()


def test_a_file_of_another_dtype_is_taken_and_the_adapter_s_own_stays(tmp_path):
    wanted = save(tmp_path / "two", seed=6, save_dtype="float16")
    model = adapt(base(), save_dtype="float32")
    model.load_adapter(str(tmp_path / "two"), "default")
    assert torch.allclose(logits(model), wanted, atol=0.01)
    assert model.peft_config["default"].save_dtype == "float32"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_damage_is_found_there_too(options, tmp_path):
    save(tmp_path / "a", **options)
    model = randomise(adapt(base(), **options), seed=8)
    before, kept = logits(model), dict(vars(model.peft_config["default"]))
    damage(tmp_path / "a")
    with pytest.raises(CTError, match="the numbers are not those that were saved"):
        model.load_adapter(str(tmp_path / "a"), "default")
    assert_same_bits(logits(model), before)
    assert vars(model.peft_config["default"]) == kept


def test_damage_to_a_file_on_the_hub_is_found_there_too(tmp_path, monkeypatch):
    """Its tensors are not read with its settings."""
    save(tmp_path / "a")
    damage(tmp_path / "a")
    for home in (peft.config, peft.utils.save_and_load):
        monkeypatch.setattr(home, "hf_hub_download", lambda _, filename, **__: str(tmp_path / "a" / filename))
    monkeypatch.setattr(peft.utils.save_and_load, "file_exists", lambda *_, **__: True)
    model = adapt(base())
    kept = dict(vars(model.peft_config["default"]))
    with pytest.raises(CTError, match="the numbers are not those that were saved"):
        model.load_adapter("organisation/adapter", "default")
    assert vars(model.peft_config["default"]) == kept


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 3}, "has k=3 and 'default' has 4; load it under a name of its own"),
        ({"form": "core"}, "has form='core'"),
        ({"basis": "random"}, "has basis='random'"),
        ({"weight_from": "bottom"}, "of another base, seed or kind of basis"),
        ({"target_modules": ["q_proj"]}, "has other modules than 'default'"),
        ({"modules_to_save": ["lm_head"]}, "no part of this adapter"),
    ],
    ids=str,
)
def test_an_adapter_of_another_kind_does_not_take_its_place(options, match, tmp_path):
    save(tmp_path / "a", **options)
    model = randomise(adapt(base()), seed=8)
    before = logits(model)
    with pytest.raises(CTError, match=match):
        model.load_adapter(str(tmp_path / "a"), "default")
    assert_same_bits(logits(model), before)


def test_neither_does_one_of_another_base_nor_into_merged_weights(tmp_path):
    save(tmp_path / "a")
    with pytest.raises(CTError, match="was trained on base weights"):
        adapt(base(seed=9)).load_adapter(str(tmp_path / "a"), "default")
    with pytest.warns(UserWarning, match="another lm_head than this base has"):
        other = base()
        other.lm_head.weight.data += 1
        adapt(other).load_adapter(str(tmp_path / "a"), "default")
    model = adapt(base())
    model.merge_adapter()
    with pytest.raises(CTError, match="unmerge it before its numbers are swapped"):
        model.load_adapter(str(tmp_path / "a"), "default")


def test_a_stored_basis_of_another_base_stays_with_the_numbers(tmp_path):
    save(tmp_path / "a", store_basis=True)
    model = adapt(base(seed=9))
    with pytest.warns(UserWarning, match="its dW is applied as it is"):
        model.load_adapter(str(tmp_path / "a"), "default")
    wanted = logits(model)
    model.peft_config["default"].store_basis = False
    save_adapter(model, tmp_path / "b")
    with pytest.warns(UserWarning, match="its dW is applied as it is"):
        assert_same_bits(logits(PeftModel.from_pretrained(base(seed=9), tmp_path / "b").eval()), wanted)


def test_an_old_file_is_told_of(tmp_path):
    wanted = save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({n: v for n, v in json.loads(file.read_text()).items() if not n.endswith("_hash")}))
    model = adapt(base())
    with pytest.warns(UserWarning, match="saved by an older ctsft without a hash"):
        model.load_adapter(str(tmp_path / "a"), "default")
    assert_same_bits(logits(model), wanted)


def test_tensors_at_hand_have_no_hash_and_are_checked_all_the_same():
    """set_peft_model_state_dict gets no settings; see "Every way into a model" in docs/trust.md."""
    model, other = randomise(adapt(base())), adapt(base())
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(other, state)
    assert_same_bits(logits(other), logits(model))
    for name, value, match in (
        ("ctsft.coefficients", torch.full_like(state["ctsft.coefficients"], torch.nan), "NaN or infinite"),
        ("ctsft.checksum", state["ctsft.checksum"] + 1, "the directions here are not those"),
        ("model.norm.weight", torch.ones(16), "no part of this adapter"),
    ):
        with pytest.raises(CTError, match=match):
            set_peft_model_state_dict(other, state | {name: value})


def test_peft_s_own_hotswap_refuses(tmp_path):
    save(tmp_path / "a")
    with pytest.raises(ValueError, match="CTSFT was passed"):
        hotswap_adapter(adapt(base()), str(tmp_path / "a"), "default")


# ---- ctsft.load_adapter


def test_one_call_loads_a_folder(tmp_path):
    one, two = save(tmp_path / "one"), save(tmp_path / "two", seed=6)
    model = ctsft.load_adapter(base(), str(tmp_path / "one"))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert_same_bits(logits(model), one)
    assert ctsft.load_adapter(model, tmp_path / "two", "second", trainable=True) is model
    model.set_adapter("second")
    assert_same_bits(logits(model), two)
    trained = ctsft.load_adapter(base(), tmp_path / "one", trainable=True)
    assert {n.rpartition(".")[0].rpartition(".")[2] for n, p in trained.named_parameters() if p.requires_grad} == {
        "ctsft_coefficients"
    }


@pytest.mark.parametrize(
    "text", ["{", "", "[]", "[" * 100_000, '{"seed": ' + "9" * 10_000 + "}", '{"peft_type": "LORA"}']
)
def test_broken_settings_are_one_sentence(text, tmp_path):
    save(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    for model in (base(), adapt(base())):
        with pytest.raises(CTError) as caught:
            ctsft.load_adapter(model, tmp_path / "a", "second")
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    if "LORA" not in text:
        with pytest.raises(CTError, match=r"adapter_config\.json (is no JSON object|cannot be read as JSON)"):
            base().load_adapter(str(tmp_path / "a"))


def test_so_is_a_place_where_nothing_lies(tmp_path):
    with pytest.raises(CTError, match=r"there is no .*none/adapter_config\.json; give the folder of an adapter\.$"):
        ctsft.load_adapter(base(), str(tmp_path / "none"))
    with pytest.raises(CTError, match=r"^organisation/adapter (was not found on the hub|cannot be loaded) \(.*\)"):
        ctsft.load_adapter(base(), "organisation/adapter")
