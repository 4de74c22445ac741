"""An export is the same function: as a LoRA in a peft that knows nothing of ctsft, or merged into a model."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ctsft import CTConfig, CTError, export_adapter
from ctsft.adapter.export import largest_logit_difference
from ctsft.adapter.layer import CTLayer
from helpers import (
    BASES,
    EMBEDDING,
    FORMS,
    HEAD,
    SHAPES,
    adapt,
    assert_close,
    assert_same_bits,
    ids,
    logits,
    owners,
    randomise,
    tiny,
)

FILE = "adapter_model.safetensors"


def exported(model, folder):
    """The LoRA of `model`, its file and its settings."""
    export_adapter(model, folder, "lora")
    return load_file(folder / FILE), json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_lora_gives_the_same_logits(shape, form, basis, tmp_path):
    model = randomise(adapt(tiny(shape), form=form, basis=basis))
    tensors, settings = exported(model, tmp_path / "lora")
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 4)
    assert not settings["rank_pattern"] and not settings["alpha_pattern"] and not settings["use_rslora"]
    assert settings["fan_in_fan_out"] == (shape == "gpt2")
    for name, layer in owners(model).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert a.dtype == b.dtype == torch.float32 and a.shape[0] == b.shape[1] == 4
        delta = layer.get_delta_weight("default")
        assert_close(b @ a, delta.T if shape == "gpt2" else delta, 1e-6)
        if layer.ctsft_basis["default"].vh is not None:
            assert_same_bits(a, layer.ctsft_basis["default"].vh)
    loaded = PeftModel.from_pretrained(tiny(shape), tmp_path / "lora").eval()
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert not any(isinstance(m, CTLayer) for m in loaded.modules())
    assert largest_logit_difference(logits(model), loaded, ids()) < 1e-5 * logits(model).abs().max().clamp(min=1)


def test_plain_peft_without_ctsft_reads_the_same_logits(tmp_path):
    """Linear, Conv1D, embedding and a mapping of K, in a process that never imports ctsft."""
    cases = {
        "linear": ("llama", {}),
        "conv": ("gpt2", {}),
        "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "tie_word_embeddings": False}),
        "tied": ("llama", {"target_modules": ["lm_head", "o_proj"], "basis": "universal", "form": "scores"}),
        "mapping": ("llama", {"k": {"q_proj": 2, "mlp.*": 5, ".*": 3}, "form": "core"}),
    }
    for name, (shape, options) in cases.items():
        options = dict(options)
        base = tiny(shape, tie_word_embeddings=options.pop("tie_word_embeddings", True))
        base.save_pretrained(tmp_path / name / "base")
        model = randomise(adapt(base, **options))
        export_adapter(model, tmp_path / name / "lora", "lora")
        save_file({"logits": logits(model), "ids": ids()}, tmp_path / name / "expected.safetensors")
    code = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from peft import PeftModel
for case in sorted(Path(sys.argv[1]).iterdir()):
    expected = load_file(case / "expected.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(case / "base"), case / "lora").eval()
    with torch.no_grad():
        print(case.name, (model(expected["ids"]).logits - expected["logits"]).abs().max().item())
assert "ctsft" not in sys.modules

import ctsft  # and after peft it is not too late to import it
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING["CTSFT"] is ctsft.CTConfig
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert differences.keys() == cases.keys()
    assert all(d < 1e-5 for d in differences.values()), differences


def test_a_mapping_of_k_is_padded_to_one_rank(tmp_path):
    model = randomise(adapt(tiny(), k={"q_proj": 2, ".*": 5}, basis="random"))
    tensors, settings = exported(model, tmp_path / "lora")
    assert settings["r"] == settings["lora_alpha"] == 5 and {t.shape[0] for n, t in tensors.items() if "_A" in n} == {5}
    a, b = (tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
    assert not a[2:].any() and not b[:, 2:].any() and a[:2].any() and b[:, :2].any()
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "lora").eval()
    assert largest_logit_difference(logits(model), loaded, ids()) < 1e-5


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ({"target_modules": ["q_proj"]}, ["q_proj"]),
        (
            {"target_modules": r".*layers\.1\..*[qv]_proj"},
            ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
        ),
    ],
)
def test_targets_are_named_shortly_where_that_says_the_same(options, names, tmp_path):
    model = randomise(adapt(tiny(), **options))
    _, settings = exported(model, tmp_path / "lora")
    assert settings["target_modules"] == names
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "lora").eval()
    assert largest_logit_difference(logits(model), loaded, ids()) < 1e-5


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tied_embedding_is_exported_for_both_uses_with_a_note(shape, form, tmp_path):
    model = randomise(adapt(tiny(shape), form=form, target_modules=[EMBEDDING[shape]]))
    notes = export_adapter(model, tmp_path / "lora", "lora")
    assert len(notes) == 2 and "vLLM" in notes[0] and "merge this LoRA twice" in notes[1]
    names = {n.split(".lora_")[0].rpartition(".")[2] for n in load_file(tmp_path / "lora" / FILE)}
    assert names == {EMBEDDING[shape], HEAD[shape]}
    loaded = PeftModel.from_pretrained(tiny(shape), tmp_path / "lora").eval()
    assert largest_logit_difference(logits(model), loaded, ids()) < 1e-5 * logits(model).abs().max().clamp(min=1)


def test_modules_saved_whole_come_along(tmp_path):
    base = tiny(tie_word_embeddings=False)
    model = randomise(adapt(base, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 1
    export_adapter(model, tmp_path / "lora", "lora")
    loaded = PeftModel.from_pretrained(tiny(tie_word_embeddings=False), tmp_path / "lora").eval()
    assert largest_logit_difference(logits(model), loaded, ids()) < 1e-5
    export_adapter(model, tmp_path / "merged", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(logits(merged), logits(loaded), 1e-5)


def test_a_bfloat16_base_is_exported_in_float32(tmp_path):
    model = randomise(adapt(tiny(dtype=torch.bfloat16)))
    tensors, _ = exported(model, tmp_path / "lora")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_the_adapter_that_was_named_is_exported(tmp_path):
    model = randomise(adapt(tiny()))
    model.add_adapter("two", CTConfig(k=3, form="core", target_modules=["v_proj"]))
    randomise(model, "two")
    export_adapter(model, tmp_path / "lora", "lora", "two")
    model.set_adapter("two")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "lora").eval()
    assert largest_logit_difference(logits(model), loaded, ids()) < 1e-5
    expected = logits(model)
    model.set_adapter("default")
    export_adapter(model, tmp_path / "merged", "merged", "two")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected, 1e-5)


def test_a_merged_export_holds_nothing_of_other_adapters(tmp_path):
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = randomise(adapt(tiny(tie_word_embeddings=False), **whole))
    for name, options in (("two", whole), ("bare", {"target_modules": ["v_proj"]})):
        model.add_adapter(name, CTConfig(k=3, **options))
        randomise(model, name)
    for factor, name in enumerate(("default", "two"), 2):
        model.base_model.model.lm_head.modules_to_save[name].weight.data *= factor
    for name in ("two", "bare"):
        asked = copy.deepcopy(model)
        asked.set_adapter(name)
        expected = logits(asked)
        asked.set_adapter("default")
        asked.merge_adapter(["default"])
        export_adapter(asked, tmp_path / name, "merged", name)
        assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()), expected, 1e-5)


@pytest.mark.parametrize("target", ("linear", "tied"))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_merged_model_loads_as_any_other(shape, target, tmp_path):
    options = {"target_modules": [EMBEDDING[shape]]} if target == "tied" else {}
    model = randomise(adapt(tiny(shape), **options))
    adapted = logits(model)
    assert export_adapter(model, tmp_path / "merged", "merged") == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(logits(loaded), adapted, 1e-5)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    kept = sum(f.stat().st_size for f in (tmp_path / "merged").glob("*.safetensors"))
    assert kept < 4 * sum(p.numel() for p in tiny(shape).parameters()) + 8192


def test_replace_is_exported_merged_only(tmp_path):
    model = randomise(adapt(tiny(), form="scores", basis="universal", universal_mode="replace"))
    with pytest.raises(CTError, match="dW has full rank; export it with --to merged"):
        export_adapter(model, tmp_path / "lora", "lora")
    adapted = logits(model)
    export_adapter(model, tmp_path / "merged", "merged")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), adapted, 1e-4)
    assert [f.name for f in tmp_path.iterdir()] == ["merged"]


def test_refusals_leave_nothing_behind(tmp_path, monkeypatch):
    model = randomise(adapt(tiny()))
    (tmp_path / "there").mkdir()
    for to in ("lora", "merged"):
        with pytest.raises(CTError, match="there exists; choose another place or remove it"):
            export_adapter(model, tmp_path / "there", to)
        with pytest.raises(CTError, match="no CT-SFT adapter 'other' to export"):
            export_adapter(model, tmp_path / "new", to, "other")
    with pytest.raises(CTError, match="to='gguf' is unknown; choose lora or merged"):
        export_adapter(model, tmp_path / "new", "gguf")

    def half(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ctsft.adapter.export.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        export_adapter(model, tmp_path / "new", "lora")
    assert [f.name for f in tmp_path.iterdir()] == ["there"]


def test_a_rank_beyond_vllms_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("ctsft.adapter.export.VLLM_LARGEST_RANK", 3)
    assert export_adapter(adapt(tiny()), tmp_path / "lora", "lora") == ["rank 4: vLLM takes adapters up to rank 3."]


def test_the_largest_difference_is_measured():
    a, b = tiny(), tiny()
    b.lm_head = torch.nn.Linear(16, 37, bias=True)
    b.lm_head.weight, b.lm_head.bias.data[:] = a.lm_head.weight, 0
    b.lm_head.bias.data[3] = -0.5
    assert largest_logit_difference(logits(a), a, ids()) == 0
    assert largest_logit_difference(logits(a), b, ids()) == pytest.approx(0.5)
