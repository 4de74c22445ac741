"""The adapter's contract, the same for every model shape x form x basis x dtype."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn

from ctsft import CTConfig, CTError, save_adapter
from ctsft.adapter.layer import CTEmbedding, CTLayer
from ctsft.spectral.weights import matrix
from helpers import (
    BASES,
    DTYPES,
    EMBEDDING,
    FORMS,
    HEAD,
    SHAPES,
    VOCABULARY,
    adapt,
    along,
    assert_close,
    assert_same_bits,
    coefficients,
    dense,
    ids,
    logits,
    owners,
    randomise,
    ready_config,
    tiny,
    twin,
)

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.02}

matrix_of_all = [
    pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16")),
    pytest.mark.parametrize("basis", BASES),
    pytest.mark.parametrize("form", FORMS),
    pytest.mark.parametrize("shape", SHAPES),
]


def every(test):
    for mark in matrix_of_all:
        test = mark(test)
    return test


@every
def test_it_starts_as_the_base_bit_for_bit(shape, form, basis, dtype):
    before = logits(tiny(shape, dtype))
    model = adapt(tiny(shape, dtype), form=form, basis=basis)
    assert_same_bits(logits(model), before)
    assert_same_bits(logits(model.train()), before)
    assert not any(c.any() for c in coefficients(model).values())


@every
def test_coefficients_train_in_float32_and_are_all_that_trains(shape, form, basis, dtype):
    model = adapt(tiny(shape, dtype), form=form, basis=basis)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(owners(model)) > 0
    assert all("ctsft_coefficients" in n and p.dtype == torch.float32 for n, p in trained.items())
    for layer in owners(model).values():
        d_out, d_in = matrix(layer.get_base_layer()).shape
        shapes = {"diagonal": {(4,)}, "core": {(4, 4)}, "scores": {(d_out, 4), (d_in, 4)}, "gains": {(d_out + 4,)}}
        assert tuple(layer.ctsft_coefficients["default"].shape) in shapes[form]
        for factor in layer.ctsft_basis["default"].tensors().values():
            assert factor.dtype == torch.float32 and not factor.requires_grad


@every
def test_layers_compute_the_dense_formula(shape, form, basis, dtype):
    model = randomise(adapt(tiny(shape, dtype), form=form, basis=basis))
    for layer in owners(model).values():
        d_w, base = dense(layer), layer.get_base_layer()
        delta = layer.get_delta_weight("default")
        assert delta.shape == base.weight.shape and delta.dtype == torch.float32
        assert_close(matrix(base, delta), d_w, 1e-6)
        x = torch.randn(3, d_w.shape[1]).to(dtype)
        expected = x.double() @ (matrix(base).double() + d_w).T
        bias = getattr(base, "bias", None)
        out = layer(x)
        assert out.dtype == dtype
        assert_close(out, expected if bias is None else expected + bias.double(), ROUNDING[dtype])


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradient_equal_those_of_dense_weights(shape, form, basis):
    """The gradient of the coefficients is the dense one seen along the basis: diag(U^T G Vh^T), papers 81 to 88."""
    model = randomise(adapt(tiny(shape), form=form, basis=basis))
    slow = twin(model, tiny(shape))
    assert_close(logits(model), logits(slow), 1e-5)

    model(input_ids=ids(), labels=ids()).loss.backward()
    slow(input_ids=ids(), labels=ids()).loss.backward()
    for name, layer in owners(model).items():
        module = slow.get_submodule(name)
        g = matrix(module, module.weight.grad)
        assert_close(layer.ctsft_coefficients["default"].grad, along(layer, g), 1e-4)


@every
def test_merging_gives_the_adapted_output_and_unmerging_the_exact_base(shape, form, basis, dtype):
    model = randomise(adapt(tiny(shape, dtype), form=form, basis=basis), scale=0.1)
    adapted, bits = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    assert_close(logits(model), adapted, 1e-5 if dtype == torch.float32 else 0.1)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, bits[n])]
    assert len(changed) == len(owners(model))
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        assert_same_bits(parameter, bits[name])
    assert_same_bits(logits(model), adapted)

    merged = model.merge_and_unload()
    assert not any(isinstance(m, CTLayer) for m in merged.modules())
    assert_close(logits(merged), adapted, 1e-5 if dtype == torch.float32 else 0.1)


@every
def test_a_saved_adapter_loads_to_the_same_bits_of_output(shape, form, basis, dtype, tmp_path):
    model = randomise(adapt(tiny(shape, dtype), form=form, basis=basis))
    save_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny(shape, dtype), tmp_path / "a").eval()
    assert_same_bits(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_disabled_it_is_the_base(shape, form):
    before = logits(tiny(shape))
    model = randomise(adapt(tiny(shape), form=form))
    adapted = logits(model)
    assert not torch.equal(adapted, before)
    with model.disable_adapter():
        assert_same_bits(logits(model), before)
    assert_same_bits(logits(model), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert_same_bits(logits(model), before)
    assert_same_bits(logits(model), adapted)


@pytest.mark.parametrize("shape", SHAPES)
def test_several_adapters(shape):
    one, two = {"form": "diagonal"}, {"form": "scores", "basis": "universal", "k": 3}
    alone = [randomise(adapt(tiny(shape), **o), seed=i) for i, o in enumerate((one, two))]
    model = adapt(tiny(shape), **one)
    model.add_adapter("two", CTConfig(**two))
    randomise(model, "default", seed=0)
    randomise(model, "two", seed=1)
    assert_same_bits(logits(model), logits(alone[0]))
    model.set_adapter("two")
    assert_same_bits(logits(model), logits(alone[1]))
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {"two"}

    model.base_model.set_adapter(["default", "two"])
    both = twin(model, twin(model, tiny(shape)), "two")
    assert_close(logits(model), logits(both), 1e-5)
    together = logits(model)
    model.merge_adapter()
    assert_close(logits(model), together, 1e-5)
    with pytest.raises(ValueError, match="unmerge"):
        model.delete_adapter("two")
    model.unmerge_adapter()

    model.set_adapter("default")
    model.delete_adapter("two")
    assert "two" not in model.peft_config
    assert not any("two" in m.ctsft_basis for m in model.modules() if isinstance(m, CTLayer))
    assert_same_bits(logits(model), logits(alone[0]))


def test_a_second_adapter_finds_the_same_default_targets_and_basis():
    model = adapt(tiny(), basis="universal")
    model.add_adapter("two", CTConfig(k=4, basis="universal"))
    assert owners(model).keys() == owners(model, "two").keys()
    for layer in owners(model).values():
        for a, b in zip(*(layer.ctsft_basis[n].tensors().values() for n in ("default", "two")), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_base_is_not_changed_by_training(shape):
    model = adapt(tiny(shape), form="core").train()
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = model(input_ids=ids(), labels=ids()).loss.item()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < start - 0.1
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert_same_bits(parameter, before[name])


def test_automatic_loading_from_a_saved_base(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    base = type(tiny()).from_pretrained(tmp_path / "base").eval()
    model = randomise(adapt(base))
    save_adapter(model, tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_same_bits(logits(loaded), logits(model))


def test_loading_with_low_cpu_memory_and_trainable(tmp_path):
    model = randomise(adapt(tiny(), target_modules=["q_proj", "lm_head"]))
    save_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "a", low_cpu_mem_usage=True, is_trainable=True).eval()
    assert_same_bits(logits(loaded), logits(model))
    trained = [p for p in loaded.parameters() if p.requires_grad]
    assert len(trained) == len(owners(loaded)) == 3


def test_modules_to_save_train_beside_it(tmp_path):
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "basis": "universal"}
    model = randomise(adapt(tiny(tie_word_embeddings=False), **options))
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    head.data += 1
    save_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny(tie_word_embeddings=False), tmp_path / "a").eval()
    assert_same_bits(logits(loaded), logits(model))
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size < 4 * (head.numel() + 4 * 4) + 2048


# ---- replace: W is its K-term reconstruction


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
@pytest.mark.parametrize("shape", SHAPES)
def test_replace_starts_as_the_k_term_reconstruction(shape, dtype, tmp_path):
    model = adapt(tiny(shape, dtype), form="scores", basis="universal", universal_mode="replace")
    slow = tiny(shape)
    for name, layer in owners(model).items():
        b, w = layer.ctsft_basis["default"], matrix(slow.get_submodule(name)).to(dtype).float()
        near = w @ b.vh.T @ b.vh if b.u is None else b.u @ b.u.T @ w
        left, right = layer.factors("default")
        assert_close(left @ right, near, 1e-5)
        matrix(slow.get_submodule(name)).data.copy_(near)
        x = torch.randn(3, w.shape[1]).to(dtype)
        bias = getattr(layer.get_base_layer(), "bias", None)
        expected = x.float() @ near.T
        assert_close(layer(x), expected if bias is None else expected + bias, ROUNDING[dtype])
    if dtype == torch.float32:
        assert_close(logits(model), logits(slow), 3e-5)
        randomise(model)
        assert_close(logits(model), logits(twin(model, tiny(shape))), 3e-5)
    save_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny(shape, dtype), tmp_path / "a").eval()
    assert_same_bits(logits(loaded), logits(model))
    adapted = logits(model)
    model.merge_adapter()
    assert_close(logits(model), adapted, 1e-4 if dtype == torch.float32 else 0.1)
    model.unmerge_adapter()
    assert_same_bits(logits(model), adapted)
    assert_close(logits(model.merge_and_unload()), adapted, 1e-4 if dtype == torch.float32 else 0.1)


def test_replace_works_alone_only():
    model = adapt(tiny(), form="scores", basis="universal", universal_mode="replace")
    model.add_adapter("two", CTConfig(k=2))
    model.base_model.set_adapter(["default", "two"])
    with pytest.raises(CTError, match="cannot be active beside another"):
        logits(model)
    with pytest.raises(CTError, match="cannot be merged with another"):
        model.merge_adapter()


# ---- a tied embedding and head are adapted as one


def tied_weights(bare):
    return bare.get_input_embeddings().weight, bare.get_output_embeddings().weight


@pytest.mark.parametrize("basis", ("weight", "random", "universal", "gradient", "file"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tied_embedding_and_head_have_one_adapter(shape, form, basis, tmp_path):
    before = logits(tiny(shape))
    model = adapt(tiny(shape), form=form, basis=basis, target_modules=[EMBEDDING[shape]])
    assert_same_bits(logits(model), before)
    bare = model.base_model.model
    embedding, head = bare.get_input_embeddings(), bare.get_output_embeddings()
    assert isinstance(embedding, CTEmbedding) and isinstance(head, CTLayer)
    assert embedding.ctsft_coefficients["default"] is head.ctsft_coefficients["default"]
    assert embedding.ctsft_basis["default"] is head.ctsft_basis["default"]
    assert len([p for p in model.parameters() if p.requires_grad]) == 1

    randomise(model)
    slow = twin(model, tiny(shape))
    assert_close(logits(model), logits(slow), 1e-5)
    model(input_ids=ids(), labels=ids()).loss.backward()
    slow(input_ids=ids(), labels=ids()).loss.backward()
    g, b = tied_weights(slow)[0].grad, embedding.ctsft_basis["default"]
    c = embedding.ctsft_coefficients["default"]
    assert_close(c.grad, along(embedding, g), 1e-4)

    save_adapter(model, tmp_path / "a")
    kept = sum(t.numel() for t in b.tensors().values()) if basis == "gradient" else 0
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size <= 4 * (c.numel() + kept) + 2048
    loaded = PeftModel.from_pretrained(tiny(shape), tmp_path / "a").eval()
    assert_same_bits(logits(loaded), logits(model))
    loaded_bare = loaded.base_model.model
    both = loaded_bare.get_input_embeddings(), loaded_bare.get_output_embeddings()
    assert both[0].ctsft_coefficients["default"] is both[1].ctsft_coefficients["default"]

    adapted, original = logits(model), tied_weights(bare)[0].clone()
    model.merge_adapter()
    assert_close(logits(model), adapted, 1e-5)
    model.unmerge_adapter()
    assert_same_bits(tied_weights(bare)[0], original)
    merged = model.merge_and_unload()
    assert_close(logits(merged), adapted, 1e-5)
    assert tied_weights(merged)[0] is tied_weights(merged)[1]
    assert_close(tied_weights(merged)[0], original.double() + dense(embedding), 1e-6)


def targets_of_the_tie(shape, which):
    names = {"embedding": [EMBEDDING[shape]], "head": [HEAD[shape]], "both": [HEAD[shape], EMBEDDING[shape]]}
    return names.get(which, rf".*{EMBEDDING[shape]}|{HEAD[shape]}" if which == "regex of both" else rf".*{HEAD[shape]}")


@pytest.mark.parametrize("which", ("head", "both", "regex of both", "regex of the head"))
@pytest.mark.parametrize("shape", SHAPES)
def test_naming_either_use_of_a_tied_weight_says_the_same(shape, which, tmp_path):
    folders = []
    for name in ("embedding", which):
        model = randomise(adapt(tiny(shape), target_modules=targets_of_the_tie(shape, name)))
        folder = tmp_path / name
        save_adapter(model, folder)
        folders.append(folder)
        folder.with_suffix(".trainer").mkdir()
        model.save_pretrained(folder.with_suffix(".trainer"))  # as a Trainer does: no embedding comes along, no warning
        folders.append(folder.with_suffix(".trainer"))
    files = {(f / "adapter_model.safetensors").read_bytes() for f in folders}
    configs = {(f / "adapter_config.json").read_bytes() for f in folders}
    assert len(files) == len(configs) == 1
    assert_same_bits(logits(PeftModel.from_pretrained(tiny(shape), folders[2]).eval()), logits(model))


def test_adapters_named_by_either_use_live_together():
    model = adapt(tiny(), target_modules=["embed_tokens"])
    model.add_adapter("two", CTConfig(k=3, target_modules=["lm_head"]))
    randomise(model, "default", seed=0)
    randomise(model, "two", seed=1)
    model.base_model.set_adapter(["default", "two"])
    before, original = logits(model), tied_weights(model.base_model.model)[0].clone()
    assert_close(before, logits(twin(model, twin(model, tiny()), "two")), 1e-5)
    model.merge_adapter()
    assert_close(logits(model), before, 1e-5)
    model.unmerge_adapter()
    assert_same_bits(tied_weights(model.base_model.model)[0], original)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_untied_head_has_an_adapter_of_its_own(shape, tmp_path):
    base = tiny(shape, tie_word_embeddings=False)
    model = randomise(adapt(base, target_modules=[EMBEDDING[shape], HEAD[shape]]))
    assert len(owners(model)) == 2
    assert_close(logits(model), logits(twin(model, tiny(shape, tie_word_embeddings=False))), 1e-5)
    save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size <= 4 * 8 + 2048
    loaded = PeftModel.from_pretrained(tiny(shape, tie_word_embeddings=False), tmp_path / "a").eval()
    assert_same_bits(logits(loaded), logits(model))


def test_an_adapter_of_a_tied_weight_is_refused_where_it_is_not_tied_and_back(tmp_path):
    untied = {"tie_word_embeddings": False}
    save_adapter(randomise(adapt(tiny(), target_modules=["embed_tokens"])), tmp_path / "tied")
    with pytest.raises(CTError, match="tied"):
        PeftModel.from_pretrained(tiny(**untied), tmp_path / "tied")
    save_adapter(randomise(adapt(tiny(**untied), target_modules=["embed_tokens"])), tmp_path / "untied")
    with pytest.raises(CTError, match="tied"):
        PeftModel.from_pretrained(tiny(), tmp_path / "untied")


def test_an_embedding_that_scales_its_output():
    model = randomise(adapt(tiny(), target_modules=["embed_tokens"]))
    embedding = model.base_model.model.get_input_embeddings()
    plain = embedding.delta("default", ids())
    embedding.base_layer.embed_scale = 3.0
    assert_close(embedding.delta("default", ids()), 3 * plain, 1e-6)


# ---- precision and memory


def storages(model):
    """Address -> bytes of all basis tensors."""
    tensors = [
        t
        for layer in model.modules()
        if isinstance(layer, CTLayer)
        for b in layer.ctsft_basis.values()
        for t in b.tensors().values()
    ]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def assert_float32(model):
    for layer in model.modules():
        if isinstance(layer, CTLayer):
            assert all(p.dtype == torch.float32 for p in layer.ctsft_coefficients.values())
            assert all(t.dtype == torch.float32 for b in layer.ctsft_basis.values() for t in b.tensors().values())


@pytest.mark.parametrize(
    "move", (lambda m: m.to(torch.bfloat16), lambda m: m.half(), copy.deepcopy, lambda m: m.to("cpu"))
)
@pytest.mark.parametrize("basis", ("weight", "universal"))
def test_a_cast_a_move_or_a_copy_of_the_model_does_not_round_the_adapter(basis, move):
    model = randomise(adapt(tiny(), basis=basis, form="scores", target_modules=["q_proj", "o_proj", "embed_tokens"]))
    model(input_ids=ids(), labels=ids()).loss.backward()
    before = [c.clone() for c in coefficients(model).values()]
    shared = len(storages(model))
    model = move(model)
    assert_float32(model)
    for a, b in zip(coefficients(model).values(), before, strict=True):
        assert_same_bits(a, b)
        assert a.grad is None or a.grad.dtype == torch.float32
    assert len(storages(model)) == shared
    bare = model.base_model.model
    both = bare.get_input_embeddings(), bare.get_output_embeddings()
    assert both[0].ctsft_coefficients["default"] is both[1].ctsft_coefficients["default"]
    assert both[1].ctsft_owner == (both[0],)
    torch.optim.SGD(coefficients(model).values(), lr=0.1).step()


def test_a_copy_is_independent():
    model = adapt(tiny())
    other = copy.deepcopy(model)
    randomise(other)
    assert_same_bits(logits(model), logits(tiny()))
    assert not torch.equal(logits(other), logits(model))


def test_peft_casting_to_the_base_dtype_leaves_it_float32():
    base = tiny(dtype=torch.bfloat16)
    assert_float32(get_peft_model(base, CTConfig(k=4), autocast_adapter_dtype=False))


def test_the_basis_is_in_no_state_dict_and_no_parameter_count():
    model = adapt(tiny(), k=4)
    names = {n.split(".ctsft_")[1] for n in model.state_dict() if ".ctsft_" in n}
    assert names == {"coefficients.default"}
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 4 * len(owners(model))
    assert total == trainable + sum(p.numel() for p in tiny().parameters())
    assert not list(model.buffers()) or all("ctsft" not in n for n, _ in model.named_buffers())


@pytest.mark.parametrize("k", (4, {"(q|o)_proj": 2, ".*": 4}))
def test_the_universal_basis_is_one_storage_and_few_tensors(k, tmp_path):
    model = adapt(tiny(), k=k, basis="universal", form="scores", store_basis=True)
    save_adapter(model, tmp_path / "a")
    for m in (model, PeftModel.from_pretrained(tiny(), tmp_path / "a")):
        assert list(storages(m).values()) == [4 * 4 * 16]
        tensors = {id(t) for x in owners(m).values() for t in x.ctsft_basis["default"].tensors().values()}
        assert len(tensors) == (2 if k == 4 else 4)  # an input side and an output side of each K


def test_amplitude_dropout_drops_whole_directions_in_training_only():
    model = randomise(adapt(tiny(), target_modules=["q_proj"], amplitude_dropout=0.5))
    layer = next(iter(owners(model).values()))
    basis, c, x = layer.ctsft_basis["default"], layer.ctsft_coefficients["default"], torch.randn(5, 16)
    assert_same_bits(layer.delta("default", x), layer.delta("default", x))
    layer.train()
    seen = set()
    for _ in range(20):
        on_u = layer.delta("default", x) @ basis.u / (x @ basis.vh.T * c)  # what each direction was multiplied by
        factors = on_u.mean(0).detach()
        assert torch.allclose(on_u, factors.expand_as(on_u), atol=1e-4)  # the same for all tokens
        assert all(min(abs(f), abs(f - 2)) < 1e-4 for f in factors.tolist())
        seen.add(tuple(factors.round().tolist()))
    assert len(seen) > 3


@pytest.mark.parametrize("kind", FORMS)
def test_amplitude_dropout_of_an_embedding(kind):
    model = randomise(adapt(tiny(), form=kind, target_modules=["embed_tokens"], amplitude_dropout=0.5))
    layer = model.base_model.model.get_input_embeddings().train()
    basis, full = layer.ctsft_basis["default"], dense(layer)[ids()].float()
    on_vh = layer.delta("default", ids()) @ basis.vh.T / (full @ basis.vh.T)
    factors = on_vh.flatten(0, 1).mean(0).detach()
    assert torch.allclose(on_vh, factors.expand_as(on_vh), atol=1e-3)
    assert all(min(abs(f), abs(f - 2)) < 1e-3 for f in factors.tolist())


def test_gradient_checkpointing_gives_the_same_gradient():
    grads = []
    for checkpointing in (False, True):
        model = randomise(adapt(tiny())).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        grads.append([c.grad for c in coefficients(model).values()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-6)


def test_generation_uses_the_adapter():
    model = randomise(adapt(tiny()), scale=1.0)
    slow = twin(model, tiny())
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(1, 4)}
    prompt = ids(1, 4)
    assert model.generate(input_ids=prompt, **options).tolist() == slow.generate(input_ids=prompt, **options).tolist()


def test_a_float64_base_keeps_its_precision():
    model = randomise(adapt(tiny(dtype=torch.float64)))
    adapted = logits(model)
    assert adapted.dtype == torch.float64
    name, layer = next(iter(owners(model).items()))
    w, d_w = layer.get_base_layer().weight.detach().clone(), layer.get_delta_weight("default").double()
    merged = model.merge_and_unload()
    assert_close(merged.get_submodule(name).weight, w + d_w, 1e-15)


def test_it_works_on_a_plain_module_that_is_no_transformer():
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    before = base(x)
    model = get_peft_model(base, ready_config(base, k=2, target_modules=["0", "2"], task_type=None))
    assert_same_bits(model(x), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_a_bfloat16_basis_is_rounded_once_and_the_same_everywhere(form, basis, dtype, tmp_path):
    base = logits(tiny(dtype=dtype))
    model = adapt(tiny(dtype=dtype), form=form, basis=basis, basis_dtype="bfloat16")
    assert_same_bits(logits(model), base)
    exact = owners(adapt(tiny(dtype=dtype), form=form, basis=basis))
    for name, layer in owners(model).items():
        for factor, tensor in layer.ctsft_basis["default"].tensors().items():
            assert tensor.dtype == torch.bfloat16
            assert_close(tensor, exact[name].ctsft_basis["default"].tensors()[factor], 2**-6)

    randomise(model, scale=0.1)
    model.save_pretrained(tmp_path)
    same_values = tiny(dtype=dtype).float()
    other = PeftModel.from_pretrained(same_values, tmp_path)
    for name, layer in owners(other).items():
        assert_same_bits(layer.get_delta_weight("default"), owners(model)[name].get_delta_weight("default"))
    assert_close(logits(other), logits(twin(model, tiny(dtype=dtype).float())), 1e-5)
    assert_close(logits(model), logits(other), ROUNDING[dtype] * 10)


@pytest.mark.parametrize("shape", ("llama", "gpt2"))
def test_the_layers_tell_their_sizes_as_a_linear_does(shape):
    for name, layer in owners(adapt(tiny(shape))).items():
        base = tiny(shape).get_submodule(name)
        sizes = (base.nf, base.nx) if shape == "gpt2" else (base.out_features, base.in_features)
        assert (layer.out_features, layer.in_features) == sizes
    embedding = adapt(tiny(shape), target_modules=[EMBEDDING[shape]]).get_base_model().get_input_embeddings()
    assert (embedding.in_features, embedding.out_features) == (VOCABULARY, 16)  # as those of peft's LoRA


def test_the_trained_numbers_are_float32_whatever_is_asked(tmp_path):
    model = get_peft_model(tiny(dtype=torch.bfloat16), CTConfig(k=4), autocast_adapter_dtype=False)
    save_adapter(model, tmp_path / "a")
    again = PeftModel.from_pretrained(tiny(dtype=torch.bfloat16), tmp_path / "a", autocast_adapter_dtype=False)
    for one in (model, again):
        assert {c.dtype for c in coefficients(one).values()} == {torch.float32}


@pytest.mark.parametrize(
    "options", [{}, {"form": "core"}, {"form": "scores", "basis": "universal"}, {"form": "gains"}], ids=str
)
def test_a_model_on_the_meta_device_tells_its_shapes(options):
    model = adapt(tiny(), **options)
    wanted = logits(model).shape
    found = model.to("meta")(input_ids=ids().to("meta")).logits
    assert found.is_meta and found.shape == wanted
