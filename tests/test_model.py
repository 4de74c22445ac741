"""CT-SFT inside peft, transformers and TRL: targets, refusals, K changed in place, training."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import ctsft.adapter.model
from ctsft import CTConfig, CTError, resize, save_adapter
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.model import find_targets, fitted, make_plan
from helpers import (
    BASES,
    FORMS,
    HEAD,
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

# ---- registration


def python(code):
    """Run `code` in a fresh interpreter, where every warning is an error, and return what it printed."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_import_alone_costs_nothing_and_a_later_import_of_peft_registers():
    code = (
        "import sys, ctsft; print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)));"
        "import peft; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m; print('CTSFT' in m);"
        "import importlib; importlib.reload(ctsft); ctsft.register(None); print(list(m).count('CTSFT'), ctsft.CTConfig)"
    )
    assert python(code).split("\n") == ["[]", "True", "1 <class 'ctsft.adapter.config.CTConfig'>"]


def test_a_file_of_ctsft_that_is_imported_first_registers_too():
    code = (
        "from ctsft.adapter.layer import CTLayer; import peft\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m; print('CTSFT' in m)"
    )
    assert python(code) == "True"


def test_what_ctsft_has_not_is_an_attribute_error():
    import ctsft

    with pytest.raises(AttributeError, match="module 'ctsft' has no attribute 'nothing'"):
        _ = ctsft.nothing
    assert all(getattr(ctsft, name) is not None for name in ctsft.__all__)


# ---- targets


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
    "a regex that fits nothing": (
        tiny,
        {"target_modules": r".*query"},
        r"target_modules \['\.\*query'\] match nothing",
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


def test_a_second_adapter_is_refused_while_one_is_merged(tmp_path):
    model = randomise(adapt(tiny()))
    save_adapter(model, tmp_path / "a")
    model.merge_adapter()
    merged = logits(model)
    for add in (lambda: model.add_adapter("two", CTConfig(k=2)), lambda: model.load_adapter(tmp_path / "a", "two")):
        with pytest.raises(
            CTError, match=r"merged into these weights, so a new basis would be that of W \+ dW; unmerge"
        ):
            add()
    assert list(model.peft_config) == ["default"]
    assert_same_bits(logits(model), merged)
    model.unmerge_adapter()
    model.add_adapter("two", CTConfig(k=2))


def test_a_refused_second_adapter_leaves_the_first_at_work():
    model = randomise(adapt(tiny()))
    before = logits(model)
    with pytest.raises(CTError, match="k=99"):
        model.add_adapter("two", CTConfig(k=99))
    assert list(model.peft_config) == ["default"]
    assert_same_bits(logits(model), before)


def test_several_adapters_in_one_batch_are_refused():
    model = adapt(tiny())
    model.add_adapter("two", CTConfig(k=2))
    names = ["default", "two", "__base__"]
    for use in (model, model.generate):
        with pytest.raises(CTError, match=r"adapter_names= .* not supported; call set_adapter"):
            use(input_ids=ids(), adapter_names=names)


def test_a_deleted_adapter_can_be_made_again_and_starts_at_zero(tmp_path):
    model = randomise(adapt(tiny(), target_modules=["q_proj", "lm_head"]))
    save_adapter(model, tmp_path / "a")
    pending = get_peft_model(tiny(), CTConfig.from_pretrained(tmp_path / "a"))
    for m in (model, pending):
        m.add_adapter("two", CTConfig(k=2))
        m.set_adapter("two")
        m.delete_adapter("default")
        m.add_adapter("default", CTConfig(k=3, target_modules=["q_proj", "lm_head"]))
        m.set_adapter("default")
        assert_same_bits(logits(m), logits(tiny()))
        assert_close(logits(randomise(m)), logits(twin(m, tiny())), 1e-5)


def test_broken_numbers_are_not_merged_safely():
    model = adapt(tiny())
    next(iter(coefficients(model).values())).data[0] = float("nan")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CTError, match=r"merging \['default'\] would give NaN or infinite weights"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("basis", ("weight", "random", "universal"))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_has_the_same_bits_twice_and_with_two_threads(shape, basis):
    plans = [make_plan(tiny(shape), CTConfig(k=4, basis=basis))]
    torch.set_num_threads(2)
    try:
        plans.append(make_plan(tiny(shape), CTConfig(k=4, basis=basis)))
        assert torch.get_num_threads() == 2
        with pytest.raises(CTError):
            make_plan(tiny(shape), CTConfig(k=99, basis=basis))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert plans[0].fingerprint == plans[1].fingerprint
    for name, a in plans[0].bases.items():
        for x, y in zip(a.tensors().values(), plans[1].bases[name].tensors().values(), strict=True):
            assert_same_bits(x, y)


def test_the_basis_is_what_was_asked_for():
    """The chosen directions of every matrix, found again by an SVD of each."""
    for choice in ("top", "bottom"):
        for layer in owners(adapt(tiny(), weight_from=choice)).values():
            w, b = layer.get_base_layer().weight.detach().double(), layer.ctsft_basis["default"]
            s = torch.linalg.svdvals(w)
            expected = s[:4] if choice == "top" else s.flip(0)[:4]
            assert torch.allclose((b.u.double().T @ w @ b.vh.double().T), torch.diag(expected), atol=1e-5)


def test_the_seed_moves_random_directions_only():
    def first(**options):
        return next(iter(owners(adapt(tiny(), **options)).values())).ctsft_basis["default"].vh

    assert not torch.allclose(first(basis="random"), first(basis="random", seed=1))
    assert not torch.allclose(first(weight_from="random"), first(weight_from="random", seed=1))
    assert_same_bits(first(), first(seed=1))


# ---- K changed in place


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
        kept = c[:3] if form == "diagonal" else c[:3, :3] if form == "core" else c[:, :3]
        assert_same_bits(kept, old[name])
        assert c.detach().count_nonzero() == old[name].numel()
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
        assert_same_bits(
            c, wide[name][:2] if form == "diagonal" else wide[name][:2, :2] if form == "core" else wide[name][:, :2]
        )
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
    with pytest.warns(UserWarning, match="stored dW"):
        model = PeftModel.from_pretrained(tiny(seed=3), tmp_path / "a").eval()
    before = logits(model)
    with pytest.raises(CTError, match="base weights are not those that the basis was made from"):
        resize(model, 2)
    assert_same_bits(logits(model), before)


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


# ---- transformers


def test_transformers_own_add_adapter_works_and_trains():
    model, before = tiny(), logits(tiny())
    model.add_adapter(CTConfig(k=4))
    assert_same_bits(logits(model), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(owners(model)) == 14
    model.train()
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(input_ids=ids(), labels=ids()).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    adapted = logits(model)
    assert_close(adapted, logits(twin(model, tiny())), 1e-5)
    model.disable_adapters()
    assert_same_bits(logits(model), before)
    model.enable_adapters()
    assert_same_bits(logits(model), adapted)


def test_transformers_own_loading_is_never_silently_wrong(tmp_path):
    save_adapter(randomise(adapt(tiny())), tmp_path / "a")
    model = tiny()
    model.load_adapter(str(tmp_path / "a"))
    with pytest.raises(CTError, match=r"weights were never loaded; use peft\.PeftModel\.from_pretrained"):
        logits(model)


# ---- TRL


class Stop(Exception):
    pass


def trainer(base, folder, config, steps=4, stop_at=None):
    """A TRL trainer on rows of random tokens; raises Stop after the checkpoint of step `stop_at`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Stopping(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == stop_at:
                raise Stop

    rows = [{"input_ids": row.tolist()} for row in ids(8, 10, seed=4)]
    settings = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=3,
    )
    return SFTTrainer(
        base,
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=[Stopping()],
    )


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(37)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="0", pad_token="1"
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"form": "scores", "basis": "universal", "k": {"q_proj": 2, ".*": 4}}, {"basis": "gradient"}],
    ids=str,
)
def test_trl_trains_saves_and_resumes_to_the_same_numbers(options, tmp_path):
    def fresh(folder, **more):
        base = tiny()
        return trainer(base, tmp_path / folder, ready_config(base, **options), **more)

    whole = fresh("whole")
    before = [c.detach().clone() for c in coefficients(whole.model).values()]
    whole.train()
    after = coefficients(whole.model)
    assert all(not torch.equal(a, b) for a, b in zip(after.values(), before, strict=True))
    assert all(c.dtype == torch.float32 for c in after.values())

    with pytest.raises(Stop):
        fresh("broken", stop_at=2).train()
    resumed = fresh("broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for name, c in coefficients(resumed.model).items():
        assert_same_bits(c, after[name])

    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "whole" / "checkpoint-4").eval()
    assert_same_bits(logits(loaded), logits(whole.model.eval()))


def test_trl_refuses_an_adapted_head_whichever_use_was_named(tmp_path):
    """TRL reads `lm_head.weight` past any adapter; the tie must not hide the adapter from its check."""
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            trainer(tiny(), tmp_path, CTConfig(k=2, target_modules=[name]))


def test_the_universal_basis_of_the_last_model_is_made_once(monkeypatch):
    made = []
    make = ctsft.adapter.model.universal_gram
    monkeypatch.setattr(ctsft.adapter.model, "LAST_UNIVERSAL", {})
    monkeypatch.setattr(ctsft.adapter.model, "universal_gram", lambda *a: made.append(1) or make(*a))
    first, again = (ctsft.adapter.model.universal_directions(tiny(), 16) for _ in range(2))
    assert first is again and len(made) == 1
    other = tiny()
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1e-3
    assert not torch.equal(ctsft.adapter.model.universal_directions(other, 16), first)
    assert len(made) == 2 and len(ctsft.adapter.model.LAST_UNIVERSAL) == 1
