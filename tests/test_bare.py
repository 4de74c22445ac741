"""transformers' own add_adapter, save_pretrained and load_adapter, without a PeftModel."""

import json

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ctsft import CTConfig, CTError, save_adapter
from helpers import adapt, assert_same_bits, coefficients, logits, randomise, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

OPTIONS = [
    {},
    {"form": "scores", "basis": "universal", "universal_mode": "replace"},
    {"form": "core", "store_basis": True},
    {"target_modules": ["q_proj", "lm_head"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_a_bare_model_saves_is_read_by_peft_and_by_a_bare_model(options, tmp_path):
    model = tiny()
    model.add_adapter(CTConfig(k=4, **options))
    wanted = logits(randomise(model))
    for _ in range(2):  # the second time over the first
        model.save_pretrained(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["tensors_hash"] and settings["fingerprint"]
    assert_same_bits(logits(PeftModel.from_pretrained(tiny(), tmp_path / "a")), wanted)
    other = tiny()
    info = other.load_adapter(tmp_path / "a")
    assert not info.missing_keys and not info.unexpected_keys
    assert_same_bits(logits(other), wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_bare_model_reads_what_peft_saved(options, tmp_path):
    model = randomise(adapt(tiny(), **options))
    save_adapter(model, tmp_path / "a")
    other = tiny()
    other.load_adapter(str(tmp_path / "a"), adapter_name="mine")
    assert_same_bits(logits(other), logits(model))
    assert not any(c.requires_grad for c in coefficients(other, "mine").values())
    trainable = tiny()
    trainable.load_adapter(str(tmp_path / "a"), is_trainable=True)
    assert all(c.requires_grad for c in coefficients(trainable).values())
    with pytest.raises(CTError, match="the model has an adapter 'mine'; give another name"):
        other.load_adapter(str(tmp_path / "a"), adapter_name="mine")


def test_a_state_dict_is_read_and_not_run_as_the_identity():
    model = tiny()
    model.add_adapter(CTConfig(k=4))
    state = randomise(model).get_adapter_state_dict()
    other = tiny()
    other.load_adapter(peft_config=CTConfig(k=4), adapter_state_dict=state)
    assert_same_bits(logits(other), logits(model))
    with pytest.raises(CTError, match="holds 56 numbers for 14 matrices and this model takes 42"):
        tiny().load_adapter(peft_config=CTConfig(k=3), adapter_state_dict=state)


def test_a_folder_that_names_its_base_is_a_model_for_transformers(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model = randomise(adapt(LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()))
    save_adapter(model, tmp_path / "a")
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()), logits(model))


def test_damage_is_seen(tmp_path):
    save_adapter(randomise(adapt(tiny())), tmp_path / "a")
    content = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CTError, match="the numbers are not those that were saved"):
        tiny().load_adapter(str(tmp_path / "a"))


def test_other_methods_are_left_to_transformers(tmp_path):
    model = get_peft_model(tiny(), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])).eval()
    model.save_pretrained(tmp_path / "lora")
    other = tiny()
    other.load_adapter(str(tmp_path / "lora"))
    assert_same_bits(logits(other), logits(model))


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "lm_head"]}])
def test_low_cpu_mem_usage_with_a_stored_basis(options, tmp_path):
    model = randomise(adapt(tiny(), store_basis=True, **options))
    save_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "a", low_cpu_mem_usage=True)
    assert_same_bits(logits(loaded), logits(model))
