"""Which modules an adapter changes, and what cannot be adapted."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ctsft import CTConfig, CTError, save_adapter
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.targets import find_targets
from helpers import HEAD, SHAPES, adapt, assert_same_bits, logits, owners, randomise, tiny


@pytest.mark.parametrize("shape", SHAPES)
def test_the_default_targets_are_all_matrices_but_embeddings_and_head(shape):
    names = {n.rpartition(".")[2] for n in owners(adapt(tiny(shape)))}
    assert (
        names
        == {
            "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            "gpt2": {"c_attn", "c_proj", "c_fc"},
            "photonic": {"qkv", "proj", "up", "down"},
        }[shape]
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*layers\.1\..*_proj"}, 7),
        ({"target_modules": ["model.layers.0.mlp.up_proj"]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, 1),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, 2),
        ({"exclude_modules": r".*mlp.*"}, 8),
    ],
    ids=str,
)
def test_targets_are_chosen_as_in_peft(options, expected, tmp_path):
    model = randomise(adapt(tiny(), **options))
    assert len(owners(model)) == expected
    save_adapter(model, tmp_path / "a")
    assert_same_bits(logits(PeftModel.from_pretrained(tiny(), tmp_path / "a").eval()), logits(model))


@pytest.mark.parametrize("shape", SHAPES)
def test_more_targets_than_peft_lists_one_by_one(shape, tmp_path):
    """Beyond 20 names peft shortens the list, also to a bare `embed_tokens`, for which it would save the whole base."""
    size = {"num_hidden_layers": 8} if shape == "llama" else {}
    names = [*find_targets(tiny(shape, **size), CTConfig())[0], HEAD[shape]]
    model = randomise(adapt(tiny(shape, **size), target_modules=names))
    model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size <= 4 * 4 * len(owners(model)) + 2048
    assert_same_bits(logits(PeftModel.from_pretrained(tiny(shape, **size), tmp_path / "a").eval()), logits(model))


def test_the_targets_that_are_found_share_no_weight_and_come_in_the_models_order():
    base = tiny()
    targets, second = find_targets(base, CTConfig(target_modules=["lm_head", "q_proj"]))
    assert next(iter(targets)) == "model.embed_tokens" and second == {"lm_head": "model.embed_tokens"}
    assert [n for n, _ in base.named_modules() if n in targets] == list(targets)


def weight_of(base, change):
    with torch.no_grad():
        change(base.model.layers[1].self_attn.q_proj.weight)
    return base


def quantised():
    base = tiny()
    projection = base.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    return base


def on_meta():
    with torch.device("meta"):
        return tiny()


REFUSED = {
    "k too large": (
        tiny,
        {"k": 9},
        r"k=9 is more than the 8 directions of model\.layers\.0\.self_attn\.k_proj \(8 x 16\); lower k, or give a "
        r"mapping such as k=\{'k_proj': 8, '\.\*': 9\}\.",
    ),
    "k too large for the scores": (tiny, {"k": 17, "form": "scores", "basis": "random"}, "17 is more than the 16"),
    "k too large for a universal basis": (
        tiny,
        {"k": 17, "form": "scores", "basis": "universal", "target_modules": ["gate_proj"]},
        "k=17 is more than the 16 directions of the residual stream",
    ),
    "no pattern of k fits": (
        tiny,
        {"k": {"q_proj": 2}},
        r"no pattern of k \(q_proj\) fits model\.layers.*k_proj; add one",
    ),
    "unknown targets": (
        tiny,
        {"target_modules": ["query", "value"]},
        r"target_modules \['query', 'value'\] match nothing in LlamaForCausalLM; it has down_proj, embed_tokens, gate",
    ),
    "one unknown target": (tiny, {"target_modules": ["q_proj", "vproj"]}, r"target_modules \['vproj'\] match nothing"),
    "all excluded": (
        tiny,
        {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
        r"of target_modules \['q_proj'\] nothing is left: exclude_modules, .* leave all of them out",
    ),
    "a regex, and all excluded": (
        tiny,
        {"target_modules": ".*q_proj", "exclude_modules": ".*attn.*"},
        r"nothing is left: exclude_modules",
    ),
    "no such block": (
        tiny,
        {"target_modules": ["q_proj"], "layers_to_transform": [9]},
        r"nothing is left: .* layers_to_transform leave all",
    ),
    "a regex that fits nothing": (
        tiny,
        {"target_modules": r".*query"},
        r"target_modules \['\.\*query'\] match nothing",
    ),
    "none at all": (
        tiny,
        {"target_modules": []},
        r"target_modules \[\] match nothing in LlamaForCausalLM; it has down",
    ),
    "a norm": (tiny, {"target_modules": ["q_proj", "norm"]}, "model.norm is a LlamaRMSNorm; CT-SFT adapts Linear"),
    "a block": (tiny, {"target_modules": ["mlp"]}, r"model\.layers\.0\.mlp is a LlamaMLP; CT-SFT adapts Linear"),
    "nan": (lambda: weight_of(tiny(), lambda w: w[0, 0].fill_(float("nan"))), {}, "q_proj has NaN or infinite weights"),
    "inf": (lambda: weight_of(tiny(), lambda w: w[0, 0].fill_(float("inf"))), {}, "q_proj has NaN or infinite weights"),
    "nan elsewhere": (
        lambda: weight_of(tiny(), lambda w: w[0, 0].fill_(float("nan"))),
        {"basis": "universal", "target_modules": ["v_proj"]},
        r"layers\.1\.self_attn\.q_proj has NaN or infinite weights",
    ),
    "meta": (on_meta, {}, "has its weight on the meta device; load the model's weights before"),
    "integers": (quantised, {}, r"q_proj is quantised \(torch\.int8\); load the model in bfloat16 or float32"),
    "not calibrated": (
        tiny,
        {"basis": "gradient"},
        r"made from data: call config = ctsft\.calibrate\(model, config, b",
    ),
    "not calibrated either": (tiny, {"basis": "activation", "form": "scores"}, "basis='activation' is made from data"),
}


@pytest.mark.parametrize(("base", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_adapted_is_refused_with_a_sentence_and_nothing_changed(base, options, message):
    base = base()
    state = [t.clone() for t in base.state_dict().values()] if base.device.type != "meta" else None
    with pytest.raises(CTError, match=message) as caught:
        get_peft_model(base, CTConfig(**{"k": 2} | options))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not any(isinstance(m, CTLayer) for m in base.modules())
    for now, before in zip(base.state_dict().values(), state or (), strict=state is not None):
        assert torch.equal(now.nan_to_num(), before.nan_to_num())


def test_a_universal_basis_needs_matrices_on_the_residual_stream():
    base = tiny("photonic")
    base.extra = nn.Linear(5, 7)
    with pytest.raises(CTError, match=r"extra \(7 x 5\) has no side of width d_model = 16"):
        get_peft_model(base, CTConfig(k=2, basis="universal", target_modules=["extra"]))
