import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ctsft import CTConfig, CTError, calibrate
from ctsft.adapter.targets import find_targets
from ctsft.spectral.collect import input_grams, mean_gradients
from ctsft.spectral.weights import matrix
from helpers import EMBEDDING, FORMS, SHAPES, adapt, assert_close, assert_same_bits, batches, ids, logits, owners, tiny


def dense_gradients(base):
    """Mean over the batches of the dense gradient of every matrix, one batch at a time."""
    total = {}
    for batch in batches():
        base.zero_grad()
        base(**batch, labels=batch["input_ids"]).loss.backward()
        for name, module in base.named_modules():
            if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
                total[name] = total.get(name, 0) + matrix(module, module.weight.grad).clone() / len(batches())
    return total


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_directions_are_those_of_the_mean_dense_gradient(shape):
    base = tiny(shape)
    names = [*find_targets(base, CTConfig())[0], EMBEDDING[shape]]
    config = calibrate(base, CTConfig(k=4, basis="gradient", target_modules=names), batches())
    expected = dense_gradients(base)
    assert len(config.calibrated) == len(names)
    for name, b in config.calibrated.items():
        g = expected[name].double()
        s = torch.linalg.svdvals(g)[:4]
        assert torch.allclose(b.u.double().T @ g @ b.vh.double().T, torch.diag(s), atol=1e-5 * s[0].item())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_activation_directions_are_those_of_the_inputs(shape):
    base = tiny(shape)
    config = calibrate(base, CTConfig(k=4, basis="activation"), batches())
    seen = {}
    handles = [
        base.get_submodule(n).register_forward_hook(
            lambda _, x, __, n=n: seen.setdefault(n, []).append(x[0].flatten(0, 1))
        )
        for n in config.calibrated
    ]
    for batch in batches():
        logits(base, batch["input_ids"])
    for handle in handles:
        handle.remove()
    for name, b in config.calibrated.items():
        x = torch.cat(seen[name]).double()
        s = torch.linalg.svdvals(x)[:4]
        assert b.u is None and torch.allclose((x @ b.vh.double().T).norm(dim=0), s, rtol=1e-4)


def test_padding_does_not_count():
    rows = ids(2, 8, seed=2)
    mask = torch.ones_like(rows)
    mask[1, 5:] = 0
    padded = rows.clone()
    padded[1, 5:] = 1
    separate = [{"input_ids": rows[:1]}, {"input_ids": rows[1:, :5]}]
    base = tiny()
    modules, _ = find_targets(base, CTConfig())
    together = input_grams(base, modules, [{"input_ids": padded, "attention_mask": mask}])
    for name, gram in input_grams(base, modules, separate).items():
        assert_close(together[name], gram, 1e-5)

    alone = mean_gradients(base, modules, [{"input_ids": rows[1:, :5]}])
    padded_row = {"input_ids": padded[1:], "attention_mask": mask[1:]}
    for name, g in mean_gradients(base, modules, [padded_row]).items():
        assert_close(g, alone[name], 1e-4)


def test_labels_count_where_they_are_given():
    base = tiny()
    modules, _ = find_targets(base, CTConfig())
    labels = ids()
    labels[:, :6] = -100
    g = mean_gradients(base, modules, [{"input_ids": ids(), "labels": labels}])
    base.zero_grad()
    base(input_ids=ids(), labels=labels).loss.backward()
    for name, module in modules.items():
        assert_close(g[name], module.weight.grad, 1e-6)


@pytest.mark.parametrize("basis", ("gradient", "activation"))
def test_the_model_and_the_config_are_left_as_they_were(basis):
    base = tiny().train()
    base.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    base.model.layers[1].eval()
    base(input_ids=ids(), labels=ids()).loss.backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in base.named_parameters()}
    wanted = {n: p.requires_grad for n, p in base.named_parameters()}
    config = CTConfig(k=4, basis=basis)
    found = calibrate(base, config, batches())
    assert config.calibrated is None and config.target_modules is None and found.calibrated
    assert (
        base.training
        and not base.model.layers[1].mlp.training
        and {n: p.requires_grad for n, p in base.named_parameters()} == wanted
    )
    for name, p in base.named_parameters():
        assert p.grad is None if grads[name] is None else torch.equal(p.grad, grads[name])
    assert not any(m._forward_pre_hooks for m in base.modules())
    base.eval()
    assert_same_bits(logits(base), logits(tiny()))
    again = calibrate(tiny(), config, batches())
    for name, b in found.calibrated.items():  # what the gradients were before does not count
        assert_same_bits(b.vh, again.calibrated[name].vh)


@pytest.mark.parametrize("basis", ("gradient", "activation"))
def test_hooks_and_flags_are_removed_after_an_error(basis):
    base = tiny()

    def broken():
        yield from batches()
        raise KeyError("no more")

    with pytest.raises(KeyError):
        calibrate(base, CTConfig(k=4, basis=basis), broken())
    assert not any(m._forward_pre_hooks for m in base.modules())
    assert all(p.requires_grad and p.grad is None for p in base.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("basis", ("gradient", "activation"))
def test_a_smaller_k_has_the_first_directions(basis, form):
    base = tiny()
    small, large = (adapt(tiny(), k=k, basis=basis, form=form) for k in (3, 6))
    for name, layer in owners(small).items():
        fewer, more = layer.ctsft_basis["default"], owners(large)[name].ctsft_basis["default"].own(3)
        for a, b in zip(fewer.tensors().values(), more.tensors().values(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    config = calibrate(base, CTConfig(k=6, basis=basis, form=form), batches())
    config.k = 3
    model = get_peft_model(base, config)
    assert all(m.ctsft_basis["default"].k == 3 for m in owners(model).values())


def test_gradient_directions_beat_random_ones_at_the_first_step():
    def first_loss_drop(basis):
        model = adapt(tiny(), basis=basis, form="core", k=4)
        loss = model(input_ids=ids(seed=2), labels=ids(seed=2)).loss
        loss.backward()
        return sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)

    assert first_loss_drop("gradient") > 2 * first_loss_drop("random")


def poisoned(change):
    base = tiny()
    change(base)
    return base


def zero_values(base):
    for layer in base.model.layers:
        layer.self_attn.v_proj.weight.data.zero_()


REFUSED = {
    "no data needed": (tiny, {"basis": "weight"}, batches, "basis='weight' needs no data; calibrate is for"),
    "no batches": (tiny, {"basis": "gradient"}, list, "got no batches; give at least one"),
    "no batches either": (tiny, {"basis": "activation"}, list, "got no batches; give at least one"),
    "an embedding": (
        tiny,
        {"basis": "activation", "target_modules": ["embed_tokens"]},
        batches,
        r"model\.embed_tokens is an embedding, whose inputs are token ids",
    ),
    "the loss": (
        lambda: poisoned(lambda m: m.model.norm.weight.data.fill_(float("nan"))),
        {"basis": "gradient"},
        batches,
        "the loss on a calibration batch is not finite",
    ),
    "the inputs": (
        lambda: poisoned(lambda m: m.model.layers[0].input_layernorm.weight.data.fill_(1e38)),
        {"basis": "activation"},
        batches,
        r"calibration gave NaN or infinite values for model\.layers\.0\.self_attn\.q_proj",
    ),
    "no gradient at all": (
        lambda: poisoned(zero_values),
        {"basis": "gradient", "target_modules": ["q_proj"]},
        batches,
        "calibration gave nothing at all for .*q_proj: its gradient or input is zero",
    ),
    "k too large": (tiny, {"basis": "gradient", "k": 99}, batches, "k=99 is more than the"),
    "labels that count nothing": (
        tiny,
        {"basis": "gradient"},
        lambda: [{"input_ids": ids(), "labels": torch.full_like(ids(), -100)}],
        "the loss on a calibration batch is not finite; look for empty rows",
    ),
}


@pytest.mark.parametrize(("base", "options", "data", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_calibrated_is_refused_with_a_sentence(base, options, data, message):
    base = base()
    with pytest.raises(CTError, match=message) as caught:
        calibrate(base, CTConfig(**{"k": 2} | options), data())
    assert str(caught.value).endswith(".")
    assert not any(m._forward_pre_hooks for m in base.modules())


def test_a_config_calibrated_for_other_targets_or_k_is_refused():
    config = calibrate(tiny(), CTConfig(k=3, basis="gradient", target_modules=["q_proj"]), batches())
    config.k = 4
    with pytest.raises(CTError, match=r"calibrated without 4 directions for model\.layers\.0\.self_attn\.q_proj"):
        get_peft_model(tiny(), config)
    config.k, config.target_modules = 3, ["v_proj"]
    with pytest.raises(CTError, match=r"calibrated without 3 directions for model\.layers\.0\.self_attn\.v_proj"):
        get_peft_model(tiny(), config)


def test_a_bfloat16_base_is_calibrated_in_float32():
    base = tiny(dtype=torch.bfloat16)
    modules, _ = find_targets(base, CTConfig())
    for collected in (mean_gradients(base, modules, batches()), input_grams(base, modules, batches())):
        assert all(t.dtype == torch.float32 for t in collected.values())
