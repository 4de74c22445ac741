"""CT-SFT where users of peft and transformers expect what LoRA does: each way in and out of a model, and the files."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch._dynamo.testing import CompileCounter

from ctsft import CTConfig, CTError, hotswap, save_adapter
from helpers import (
    adapt,
    assert_close,
    assert_same_bits,
    coefficients,
    logits,
    owners,
    randomise,
    ready_config,
    tiny,
)

TIED = ["q_proj", "lm_head"]  # lm_head shares its weight with embed_tokens

# ---- transformers: add_adapter, load_adapter and save_pretrained


def added(**options):
    """A tiny transformers model with an adapter of its own, as if after training."""
    model = tiny()
    model.add_adapter(ready_config(model, **options))
    return randomise(model).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"basis": "gradient", "target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["norm"], "save_dtype": "float16", "k": {"q_proj": 2, ".*": 3}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # transformers calls its own
def test_what_transformers_saves_is_read_by_peft_and_by_transformers(options, tmp_path):
    model = added(**options)
    if "modules_to_save" in options:
        model.model.norm.modules_to_save["default"].weight.data += 0.5
    if "save_dtype" in options:
        for name, parameter in model.named_parameters():
            if "ctsft_coefficients" in name:
                parameter.data = parameter.data.half().float()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "a")  # over an older one
    assert_same_bits(logits(PeftModel.from_pretrained(tiny(), tmp_path / "a").eval()), logits(model))
    again = tiny()
    info = again.load_adapter(str(tmp_path / "a"))
    assert not info.missing_keys and not info.unexpected_keys
    assert_same_bits(logits(again.eval()), logits(model))


@pytest.mark.parametrize("options", [{}, {"basis": "gradient"}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_a_key_mapping_does_not_reach_a_file_that_names_no_weights(options, tmp_path):
    model = randomise(adapt(tiny(tie_word_embeddings=False), **options))
    save_adapter(model, tmp_path / "a")
    base = tiny(tie_word_embeddings=False)
    again = PeftModel.from_pretrained(base, tmp_path / "a", key_mapping={"^model": "model.text"})
    assert_same_bits(logits(again.eval()), logits(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # transformers calls its own
def test_a_key_mapping_still_renames_the_tensors_of_others(tmp_path):
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(tiny(), tmp_path / "a", key_mapping={"q_proj": "q_proj"})
    assert_same_bits(logits(again.eval()), logits(model.eval()))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(tiny(), tmp_path / "a", key_mapping={"q_proj": "k_proj"})


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # peft, of any second adapter
@pytest.mark.parametrize("options", [{}, {"basis": "activation"}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_transformers_loads_what_peft_saved(options, tmp_path):
    model = randomise(adapt(tiny(), **options))
    save_adapter(model, tmp_path / "a")
    other = tiny()
    other.load_adapter(str(tmp_path / "a"), adapter_name="mine", low_cpu_mem_usage=True)
    assert_same_bits(logits(other), logits(model))
    if not options:  # transformers cannot have modules_to_save in one of two
        other.add_adapter(CTConfig(k=2), "two")
        other.set_adapter("mine")
        assert_same_bits(logits(other), logits(model))


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_tensors_at_hand_are_loaded_by_transformers(prefix):
    model, other = added(), tiny()
    tensors = {f"{prefix}{name}": tensor for name, tensor in model.get_adapter_state_dict().items()}
    other.load_adapter(peft_config=CTConfig(k=4), adapter_state_dict=tensors)
    assert_same_bits(logits(other), logits(model))


# ---- hotswap


@pytest.mark.parametrize(
    "options", [{}, {"store_basis": True}, {"basis": "gradient"}, {"target_modules": TIED}, {"form": "gains"}], ids=str
)
def test_new_numbers_are_swapped_in_without_compiling_again(options, tmp_path):
    for seed in (1, 2):
        save_adapter(randomise(adapt(tiny(), **options), seed=seed), tmp_path / str(seed))
    model = PeftModel.from_pretrained(tiny(), tmp_path / "1").eval()
    kept = list(coefficients(model).values()), [m.ctsft_basis["default"] for m in owners(model).values()]
    graphs = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(model, backend=graphs)
    one = logits(compiled)
    count = graphs.frame_count
    hotswap(compiled, tmp_path / "2")
    two = logits(compiled)
    assert count and graphs.frame_count == count and not torch.equal(one, two)
    assert_close(two, logits(PeftModel.from_pretrained(tiny(), tmp_path / "2").eval()), 1e-6)
    now = list(coefficients(model).values()), [m.ctsft_basis["default"] for m in owners(model).values()]
    assert all(a is b for before, after in zip(kept, now, strict=True) for a, b in zip(before, after, strict=True))


def test_numbers_under_other_directions_are_not_swapped_in(tmp_path):
    model = randomise(adapt(tiny()))
    before = logits(model)
    others = {
        "k": ({"k": 3}, "has k=3 and 'default' has 4; load it under a name"),
        "form": ({"form": "core"}, "has form='core'"),
        "few": ({"target_modules": ["q_proj"]}, "has other modules than 'default'"),
        "ends": ({"weight_from": "bottom"}, "they are of another base, seed or kind of basis"),
        "whole": ({"modules_to_save": ["lm_head"]}, "modules_to_save cannot be swapped in place"),
    }
    for name, (options, message) in others.items():
        save_adapter(randomise(adapt(tiny(), **options)), tmp_path / name)
        with pytest.raises(CTError, match=message):
            hotswap(model, tmp_path / name)
    save_adapter(randomise(adapt(tiny(seed=9))), tmp_path / "base")
    with pytest.raises(CTError, match="was trained on base weights"):
        hotswap(model, tmp_path / "base")
    with pytest.raises(CTError, match="no CT-SFT adapter 'two' to swap"):
        hotswap(model, tmp_path / "k", "two")
    assert_same_bits(logits(model), before)
    model.merge_adapter()
    with pytest.raises(CTError, match="unmerge it before its numbers are swapped"):
        hotswap(model, tmp_path / "k")


def test_transformers_own_hotswap(tmp_path):
    for seed in (1, 2):
        save_adapter(randomise(adapt(tiny()), seed=seed), tmp_path / str(seed))
    model, other = tiny(), tiny()
    model.load_adapter(str(tmp_path / "1"), "mine")
    model.load_adapter(str(tmp_path / "2"), "mine", hotswap=True)
    other.load_adapter(str(tmp_path / "2"))
    assert_same_bits(logits(model), logits(other))
    with pytest.raises(CTError, match="no CT-SFT adapter 'yours' to swap"):
        model.load_adapter(str(tmp_path / "2"), "yours", hotswap=True)
