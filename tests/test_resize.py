"""K changed in place."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from ctsft import CTConfig, CTError, resize, save_adapter
from ctsft.adapter.resize import fitted
from ctsft.spectral.decompose import leading_triples
from helpers import (
    BASES,
    EVEN,
    FORMS,
    SHAPES,
    adapt,
    assert_close,
    assert_same_bits,
    coefficients,
    ids,
    logits,
    owners,
    randomise,
    ready_config,
    tiny,
    twin,
)


def shared(form, c, k):
    """Of the trained numbers `c` at K = 6, those of the first `k` directions."""
    return {
        "diagonal": lambda: c[:k],
        "core": lambda: c[:k, :k],
        "scores": lambda: c[:, :k],
        "gains": lambda: c[: len(c) - 6 + k],
    }[form]()


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_k_changes_in_place(shape, form, basis, tmp_path):
    base = tiny(shape)
    model = get_peft_model(base, ready_config(base, k=6, form=form, basis=basis)).eval()
    resize(model, 3)
    randomise(model)
    assert model.peft_config["default"].k == 3
    parameters, before = coefficients(model), logits(model)
    old = {n: c.detach().clone() for n, c in parameters.items()}

    resize(model, 6)
    assert_close(logits(model), before, 1e-5)  # new directions start at zero
    for name, c in coefficients(model).items():
        assert c is parameters[name] and c.requires_grad
        assert_same_bits(shared(form, c, 3), old[name])
        new = torch.zeros_like(c) if form != "gains" else torch.full_like(c, -EVEN)
        assert (c.detach() == new).sum() == c.numel() - old[name].numel()
    fresh = adapt(tiny(shape), k=6, form=form, basis=basis)
    for name, layer in owners(model).items():
        again = owners(fresh)[name].ctsft_basis["default"].tensors()
        for factor, t in layer.ctsft_basis["default"].tensors().items():
            assert torch.allclose(t, again[factor], atol=1e-6)

    randomise(model, seed=8)
    save_adapter(model, tmp_path / "a")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["k"] == 6
    assert_same_bits(logits(PeftModel.from_pretrained(tiny(shape), tmp_path / "a").eval()), logits(model))

    wide = {n: c.detach().clone() for n, c in coefficients(model).items()}
    resize(model, 2)
    for name, c in coefficients(model).items():
        assert_same_bits(c, shared(form, wide[name], 2))
    assert_close(logits(model), logits(twin(model, tiny(shape))), 1e-5)


@pytest.mark.parametrize("carry", (False, True))
def test_the_optimizer_is_reset_or_carried_and_training_goes_on(carry):
    model = adapt(tiny(), k=3, form="core").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    losses = [step() for _ in range(3)]
    parameter = next(iter(coefficients(model).values()))
    moment = optimizer.state[parameter]["exp_avg"].clone()
    resize(model, 5, optimizer=optimizer, carry=carry)
    assert parameter.grad is None and parameter.shape == (5, 5)
    if carry:
        state = optimizer.state[parameter]
        assert_same_bits(state["exp_avg"][:3, :3], moment)
        assert state["exp_avg"].count_nonzero() == moment.numel() and state["step"] == 3
    else:
        assert parameter not in optimizer.state
    losses += [step() for _ in range(5)]
    assert parameter[4].any() and losses[-1] < losses[0]
    resize(model, 2, optimizer=optimizer, carry=carry)
    assert not carry or optimizer.state[parameter]["exp_avg"].shape == (2, 2)
    assert torch.isfinite(torch.tensor(step()))


def test_k_changes_to_a_mapping_and_with_a_tied_weight(tmp_path):
    model = randomise(
        adapt(tiny(), k=2, basis="universal", form="scores", target_modules=["q_proj", "o_proj", "lm_head"])
    )
    before = logits(model)
    resize(model, {"q_proj": 4, "o_proj": 3, ".*": 5})
    assert_close(logits(model), before, 1e-5)
    assert [m.ctsft_basis["default"].k for m in owners(model).values()] == [5, 4, 3, 4, 3]
    bare = model.base_model.model
    both = bare.get_input_embeddings(), bare.get_output_embeddings()
    assert both[0].ctsft_basis["default"] is both[1].ctsft_basis["default"]
    assert both[0].ctsft_coefficients["default"] is both[1].ctsft_coefficients["default"]
    assert_close(logits(randomise(model, seed=2)), logits(twin(model, tiny())), 1e-5)
    save_adapter(model, tmp_path / "a")
    assert_same_bits(logits(PeftModel.from_pretrained(tiny(), tmp_path / "a").eval()), logits(model))


def test_growing_a_replacing_adapter_reconstructs_more_of_w():
    model = adapt(tiny(), k=4, form="scores", basis="universal", universal_mode="replace")
    errors = []
    for k in (4, 8, 16):
        resize(model, k)
        errors.append((logits(model) - logits(tiny())).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4


@pytest.mark.parametrize("basis", ("gradient", "activation"))
def test_k_never_grows_beyond_what_was_calibrated(basis, tmp_path):
    base = tiny()
    model = randomise(get_peft_model(base, ready_config(base, k=4, basis=basis)).eval())
    before = logits(model)
    with pytest.raises(CTError, match=r"calibrated without 5 directions for model\.layers\.0\.self_attn\.q_proj"):
        resize(model, 5)
    assert_same_bits(logits(model), before)
    save_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "a").eval()
    with pytest.raises(CTError, match="calibrated without 5 directions"):
        resize(loaded, 5)
    for m in (model, loaded):
        resize(m, 2)
    assert_same_bits(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_k_cannot_change_on_base_weights_that_the_basis_was_not_made_from(tmp_path):
    save_adapter(randomise(adapt(tiny(), store_basis=True)), tmp_path / "a")
    with pytest.warns(UserWarning, match="its dW"):
        model = PeftModel.from_pretrained(tiny(seed=3), tmp_path / "a").eval()
    before = logits(model)
    with pytest.raises(CTError, match="base weights are not those that the basis was made from"):
        resize(model, 2)
    assert_same_bits(logits(model), before)


@pytest.mark.parametrize("k", [2, 6])
def test_k_cannot_change_where_a_stored_basis_has_other_directions_than_come_out_here(k, tmp_path, monkeypatch):
    def turned(w, k):
        triples = leading_triples(w, k)
        order = [1, 0, *range(2, k)]
        return triples[0][:, order], triples[1][order], triples[2][order]

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("ctsft.spectral.basis.leading_triples", turned)
        save_adapter(randomise(adapt(tiny(), k=4, store_basis=True)), tmp_path / "a")
    model = PeftModel.from_pretrained(tiny(), tmp_path / "a").eval()
    before = logits(model)
    with pytest.raises(CTError, match=r"directions of model\.layers\.0\..* come out otherwise here than .*; change it"):
        resize(model, k)
    assert_same_bits(logits(model), before)
    assert model.peft_config["default"].k == 4


def test_a_refused_change_of_k_changes_nothing():
    model = randomise(adapt(tiny(), k=4))
    before = logits(model)
    for k, message in ((99, "k=99"), ({"q_proj": 2}, "no pattern of k"), (0, "at least 1")):
        with pytest.raises(CTError, match=message):
            resize(model, k)
    with pytest.raises(CTError, match="no CT-SFT adapter 'other' to resize"):
        resize(model, 2, "other")
    assert model.peft_config["default"].k == 4
    assert_same_bits(logits(model), before)
    model.add_adapter("two", CTConfig(k=2, basis="universal", target_modules=["q_proj"]))
    model.merge_adapter()
    for name in ("default", "two"):  # merged weights are part of the other's basis too
        with pytest.raises(CTError, match="unmerge it before K is changed"):
            resize(model, 2, name)


def test_fitted_cuts_and_pads():
    t = torch.arange(6.0).view(2, 3)
    assert fitted(t, (3, 2)).tolist() == [[0, 1], [3, 4], [0, 0]]
