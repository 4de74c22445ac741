"""What is on disk: small, exact, refused where it would be wrong."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ctsft.spectral.kinds
from ctsft import CTConfig, CTError, resize, save_adapter
from ctsft.adapter.store import base_fingerprint, replace_folder
from ctsft.spectral.basis import Basis
from helpers import (
    FORMS,
    SHAPES,
    adapt,
    assert_close,
    assert_same_bits,
    coefficients,
    logits,
    owners,
    randomise,
    tiny,
)

FILE = "adapter_model.safetensors"

# pytest.warns hands on what it did not expect, without the module by which pyproject.toml knows it
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the adapter was saved by an older ctsft:UserWarning"),  # see `tamper`
]


def load(base, folder, **options):
    return PeftModel.from_pretrained(base, folder, **options).eval()


def numbers(model):
    return sum(c.numel() for c in coefficients(model).values())


def size(folder):
    return (folder / FILE).stat().st_size


def deltas(model):
    return {n: m.get_delta_weight("default") for n, m in owners(model).items()}


def assert_same_deltas(a, b):
    a, b = deltas(a), deltas(b)
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(a[name], b[name])


def other(shape="llama", dtype=torch.float32):
    """The same model with weights rounded to bfloat16: another base."""
    return tiny(shape, torch.bfloat16).to(dtype)


def tamper(folder, change):
    """Change the tensors of an adapter as if an older ctsft, which wrote no hashes, had saved them so."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    old = {n: v for n, v in settings(folder).items() if not n.endswith("_hash")}
    (folder / "adapter_config.json").write_text(json.dumps(old))


def settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


# ---- size


@pytest.mark.parametrize("save_dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("basis", ("weight", "random", "universal"))
@pytest.mark.parametrize("form", FORMS)
def test_a_recomputable_basis_costs_nothing_on_disk(form, basis, save_dtype, tmp_path):
    model = randomise(adapt(tiny(), form=form, basis=basis, save_dtype=save_dtype))
    written = save_adapter(model, tmp_path / "a")
    width = 4 if save_dtype == "float32" else 2
    assert width * numbers(model) < size(tmp_path / "a") <= width * numbers(model) + 2048
    assert written == sum(f.stat().st_size for f in (tmp_path / "a").iterdir() if f.name.startswith("adapter_"))
    saved = settings(tmp_path / "a")
    assert saved["stored_basis"] is False and saved["fingerprint"].startswith("xxh3-")
    loaded = load(tiny(), tmp_path / "a")
    for name, c in coefficients(model).items():
        got = coefficients(loaded)[name]
        assert got.dtype == torch.float32
        assert_same_bits(got, c.to(getattr(torch, save_dtype)).float())


def test_replace_costs_nothing_more_than_its_scores(tmp_path):
    model = randomise(adapt(tiny(), form="scores", basis="universal", universal_mode="replace"))
    save_adapter(model, tmp_path / "a")
    assert size(tmp_path / "a") <= 4 * numbers(model) + 2048
    assert_same_bits(logits(load(tiny(), tmp_path / "a")), logits(model))


def test_the_bytes_are_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        save_adapter(randomise(adapt(tiny())), tmp_path / name)
    for file in (FILE, "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_nothing_is_pickled_and_the_names_are_ours(tmp_path):
    save_adapter(randomise(adapt(tiny())), tmp_path / "a")
    assert {f.name for f in (tmp_path / "a").iterdir()} == {FILE, "adapter_config.json", "README.md"}
    with safe_open(tmp_path / "a" / FILE, "pt") as file:
        assert set(file.keys()) == {"ctsft.coefficients", "ctsft.checksum"}


def test_several_adapters_have_folders_of_their_own(tmp_path):
    model = randomise(adapt(tiny()))
    model.add_adapter("two", CTConfig(k=3, form="core"))
    randomise(model, "two", seed=9)
    save_adapter(model, tmp_path / "one")
    save_adapter(model, tmp_path / "two", "two")
    loaded = load(tiny(), tmp_path / "one")
    loaded.load_adapter(tmp_path / "two", "second")
    assert_same_bits(logits(loaded), logits(model))
    loaded.set_adapter("second")
    model.set_adapter("two")
    assert_same_bits(logits(loaded), logits(model))


# ---- other base weights


@pytest.mark.parametrize("basis", ("weight", "universal"))
@pytest.mark.parametrize("shape", SHAPES)
def test_another_base_is_refused_with_both_fingerprints(shape, basis, tmp_path):
    save_adapter(randomise(adapt(tiny(shape), basis=basis)), tmp_path / "a")
    base = other(shape)
    here = base_fingerprint(base, CTConfig(basis=basis), targets_of(adapt(other(shape), basis=basis)))
    with pytest.raises(CTError) as caught:
        load(base, tmp_path / "a")
    for said in (settings(tmp_path / "a")["fingerprint"], here, "load the original base", "store_basis=True", "LoRA"):
        assert said in str(caught.value)


def targets_of(model):
    return {n: m.get_base_layer() for n, m in owners(model).items()}


def test_a_universal_basis_depends_on_matrices_that_are_not_adapted(tmp_path):
    save_adapter(randomise(adapt(tiny(), basis="universal", target_modules=["q_proj"])), tmp_path / "universal")
    save_adapter(randomise(adapt(tiny(), basis="weight", target_modules=["q_proj"])), tmp_path / "weight")

    def changed():
        base = tiny()
        base.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
        return base

    with pytest.raises(CTError, match="trained on base weights"):
        load(changed(), tmp_path / "universal")
    load(changed(), tmp_path / "weight")


@pytest.mark.parametrize("basis", ("weight", "random", "universal"))
def test_the_same_values_in_another_dtype_load(basis, tmp_path):
    model = randomise(adapt(tiny(dtype=torch.bfloat16), basis=basis))
    save_adapter(model, tmp_path / "a")
    assert_same_deltas(load(tiny(dtype=torch.bfloat16).float(), tmp_path / "a"), model)


@pytest.mark.parametrize(
    "options",
    [
        {"store_basis": True},
        {"store_basis": True, "basis": "random", "form": "core"},
        {"store_basis": True, "basis": "universal", "form": "diagonal"},
        {"store_basis": True, "basis": "universal", "form": "scores"},
        {"store_basis": True, "basis": "universal", "form": "scores", "k": {"q_proj": 2, ".*": 4}},
        {"basis": "gradient"},
        {"basis": "gradient", "form": "scores"},
        {"basis": "activation", "form": "core"},
        {"basis": "activation", "form": "scores"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stored_basis_gives_the_same_change_on_another_base_with_a_warning(shape, options, tmp_path):
    if shape == "gpt2" and isinstance(options.get("k"), dict):
        options = options | {"k": {"c_attn": 2, ".*": 4}}
    model = randomise(adapt(tiny(shape), **options))
    save_adapter(model, tmp_path / "a")
    assert settings(tmp_path / "a")["stored_basis"] is True
    same = load(tiny(shape), tmp_path / "a")
    assert_same_bits(logits(same), logits(model))
    with pytest.warns(UserWarning, match=r"trained on base weights xxh3-\w+ and these are xxh3-\w+; its dW"):
        moved = load(other(shape), tmp_path / "a")
    assert_same_deltas(moved, model)

    # and it stays whole when it is saved from there
    save_adapter(moved, tmp_path / "b")
    assert settings(tmp_path / "b")["fingerprint"] == settings(tmp_path / "a")["fingerprint"]
    with pytest.warns(UserWarning, match="its dW"):
        assert_same_deltas(load(other(shape), tmp_path / "b"), model)
    assert_same_bits(logits(load(tiny(shape), tmp_path / "b")), logits(model))


@pytest.mark.parametrize("form", ["diagonal", "core", "scores", "gains"])
def test_random_directions_are_the_same_on_another_base(form, tmp_path):
    model = randomise(adapt(tiny(), basis="random", form=form))
    save_adapter(model, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"trained on base weights xxh3-\w+ and these are xxh3-\w+; its dW is applied"):
        moved = load(other("llama"), tmp_path / "a")
    assert_same_deltas(moved, model)
    save_adapter(moved, tmp_path / "b")
    assert settings(tmp_path / "b")["fingerprint"] == settings(tmp_path / "a")["fingerprint"]
    assert settings(tmp_path / "b")["stored_basis"] is False
    assert_same_bits(logits(load(tiny(), tmp_path / "b")), logits(model))
    resize(moved, 2)
    resize(model, 2)
    assert_same_deltas(moved, model)


def test_a_stored_universal_basis_is_written_once(tmp_path):
    model = randomise(adapt(tiny(), basis="universal", form="scores", store_basis=True))
    save_adapter(model, tmp_path / "a")
    assert size(tmp_path / "a") <= 4 * (numbers(model) + 4 * 16) + 2048


@pytest.mark.parametrize("basis", ("weight", "universal"))
def test_the_basis_is_stored_when_the_base_weights_have_changed_since(basis, tmp_path):
    model = randomise(adapt(tiny(), basis=basis))
    layer = next(iter(owners(model).values()))
    layer.get_base_layer().weight.data.mul_(2)
    save_adapter(model, tmp_path / "a")
    assert settings(tmp_path / "a")["stored_basis"] is True
    with pytest.warns(UserWarning, match="its dW"):
        loaded = load(merged_like(model), tmp_path / "a")
    assert_same_deltas(loaded, model)
    assert_same_bits(logits(loaded), logits(model))
    assert_same_deltas(load(tiny(), tmp_path / "a"), model)
    layer.get_base_layer().weight.data.div_(2)  # undone: recomputable again
    save_adapter(model, tmp_path / "b")
    assert settings(tmp_path / "b")["stored_basis"] is False


def merged_like(model):
    """A fresh base with the base weights that `model` has now."""
    base = tiny()
    for name, layer in owners(model).items():
        base.get_submodule(name).weight.data.copy_(layer.get_base_layer().weight.data)
    return base


@pytest.mark.parametrize("basis", ("weight", "universal"))
def test_saving_while_merged_is_as_saving_before(basis, tmp_path):
    model = randomise(adapt(tiny(), basis=basis, target_modules=["q_proj", "o_proj", "lm_head"]))
    save_adapter(model, tmp_path / "a")
    model.merge_adapter()
    save_adapter(model, tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert settings(tmp_path / "a") == settings(tmp_path / "b")


# ---- another machine, and damage


def turned(b):
    """The first two directions turned into each other, as rounding does with equal singular values."""
    r = torch.eye(b.k)
    r[:2, :2] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    return Basis(None if b.u is None else b.u @ r, None if b.vh is None else r.T @ b.vh)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("maker", ("weight_basis", "random_basis"))
def test_directions_that_come_out_turned_are_detected(form, maker, tmp_path, monkeypatch):
    model = randomise(adapt(tiny(), form=form, basis=maker.removesuffix("_basis")))
    save_adapter(model, tmp_path / "a")
    make = getattr(ctsft.spectral.kinds, maker)
    monkeypatch.setattr(ctsft.spectral.kinds, maker, lambda *a: turned(make(*a)))
    with pytest.raises(
        CTError, match=r"differ .* in 14 of 14 matrices \(first: model\.layers\.0\.self_attn\.q_proj\)"
    ) as e:
        load(tiny(), tmp_path / "a")
    assert "store_basis=True where it was trained, or use its LoRA export" in str(e.value)


def test_a_turned_universal_basis_is_detected(tmp_path, monkeypatch):
    save_adapter(randomise(adapt(tiny(), form="scores", basis="universal")), tmp_path / "a")
    make = ctsft.spectral.kinds.principal_directions
    monkeypatch.setattr(ctsft.spectral.kinds, "principal_directions", lambda *a: make(*a).roll(1, 0))
    monkeypatch.setattr(ctsft.spectral.kinds, "LAST_UNIVERSAL", {})  # as in another process
    with pytest.raises(CTError, match="differ from those that the adapter was trained on"):
        load(tiny(), tmp_path / "a")


def test_one_turned_matrix_among_many_is_named(tmp_path):
    save_adapter(randomise(adapt(tiny())), tmp_path / "a")
    tamper(tmp_path / "a", lambda t: t["ctsft.checksum"][3].add_(0.01))
    with pytest.raises(CTError, match=r"in 1 of 14 matrices \(first: model\.layers\.0\.self_attn\.o_proj\)"):
        load(tiny(), tmp_path / "a")


def test_a_small_difference_in_rounding_is_no_reason_to_refuse(tmp_path, monkeypatch):
    model = randomise(adapt(tiny()))
    save_adapter(model, tmp_path / "a")
    make = ctsft.spectral.kinds.weight_basis
    monkeypatch.setattr(
        ctsft.spectral.kinds, "weight_basis", lambda *a: Basis(make(*a).u * (1 + 1e-7), make(*a).vh * (1 + 1e-7))
    )
    assert_close(logits(load(tiny(), tmp_path / "a")), logits(model), 1e-5)


def cut(tensors):
    tensors["ctsft.coefficients"] = tensors["ctsft.coefficients"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"holds 55 numbers for 14 matrices and this model takes 56 for 14; it is an adapter of another model"),
        (lambda t: t.pop("ctsft.coefficients"), "holds no CT-SFT numbers"),
        (lambda t: t.pop("ctsft.checksum"), "holds no CT-SFT numbers"),
        (
            lambda t: t["ctsft.coefficients"][5].fill_(float("nan")),
            "NaN or infinite numbers in 'ctsft.coefficients'; it is damaged",
        ),
        (lambda t: t["ctsft.checksum"][0].fill_(float("nan")), "NaN or infinite numbers in 'ctsft.checksum'"),
    ],
    ids=("cut", "no coefficients", "no checksum", "nan", "nan checksum"),
)
def test_a_damaged_file_is_refused(change, message, tmp_path):
    save_adapter(randomise(adapt(tiny())), tmp_path / "a")
    tamper(tmp_path / "a", change)
    with pytest.raises(CTError, match=message):
        load(tiny(), tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["ctsft.basis.model.layers.0.mlp.up_proj.u"].mul_(-1),
            r"not the one that was saved \(first: .*up_proj",
        ),
        (
            lambda t: [t.pop(f"ctsft.basis.model.layers.0.mlp.up_proj.{f}") for f in ("u", "vh")],
            "no basis for .*up_proj",
        ),
        (
            lambda t: t.update({"ctsft.basis.model.layers.0.mlp.up_proj.u": torch.zeros(5, 4)}),
            r"holds ctsft\.basis\.model\.layers\.0\.mlp\.up_proj\.u as torch\.float32 \(5, 4\), which is not what",
        ),
    ],
    ids=("other values", "missing", "another shape"),
)
def test_a_damaged_stored_basis_is_refused(change, message, tmp_path):
    save_adapter(randomise(adapt(tiny(), store_basis=True)), tmp_path / "a")
    tamper(tmp_path / "a", change)
    with pytest.raises(CTError, match=message):
        load(tiny(), tmp_path / "a")


@pytest.mark.parametrize("left", (0, 5, 100, -10))
def test_a_truncated_file_is_refused(left, tmp_path):
    save_adapter(randomise(adapt(tiny())), tmp_path / "a")
    content = (tmp_path / "a" / FILE).read_bytes()
    (tmp_path / "a" / FILE).write_bytes(content[:left])
    with pytest.raises(CTError, match=r"adapter_model\.safetensors is truncated or damaged"):
        load(tiny(), tmp_path / "a")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(randomise(adapt(tiny())), tmp_path / "a")
    for base in (tiny("gpt2"), tiny(num_hidden_layers=3), tiny(seed=7)):
        with pytest.raises(CTError, match=r"match nothing in GPT2LMHeadModel|trained on base weights"):
            load(base, tmp_path / "a")
    stored = tmp_path / "stored"
    save_adapter(randomise(adapt(tiny(), store_basis=True, target_modules=["q_proj"])), stored)
    with (
        pytest.warns(UserWarning, match="its dW"),
        pytest.raises(CTError, match=r"no basis for model\.layers\.2\.self_attn\.q_proj|another model"),
    ):
        load(tiny(num_hidden_layers=3), stored)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), 1e39))
def test_numbers_that_are_not_finite_are_not_saved(value, tmp_path):
    model = randomise(adapt(tiny(), save_dtype="float16"))
    next(iter(coefficients(model).values())).data[0] = value if value < 1e38 or value != value else 1e38
    with pytest.raises(CTError, match=r"adapter 'default' holds NaN, infinite or \(in float16\) too large numbers"):
        save_adapter(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_config_from_disk_without_its_numbers_is_refused_at_the_first_forward(tmp_path):
    save_adapter(randomise(adapt(tiny())), tmp_path / "a")
    model = get_peft_model(tiny(), CTConfig.from_pretrained(tmp_path / "a"))
    for use in (lambda: logits(model), model.merge_adapter, lambda: save_adapter(model, tmp_path / "b")):
        with pytest.raises(
            CTError, match=r"configured from disk but its weights were never loaded; use peft\.PeftModel"
        ):
            use()
    model.load_adapter(tmp_path / "a", "default")
    assert torch.isfinite(logits(model)).all()


# ---- a kill in the middle


def content(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("error", (KeyboardInterrupt, OSError("no space left")))
def test_a_save_that_breaks_off_leaves_the_old_folder_and_nothing_else(error, tmp_path, monkeypatch):
    model = randomise(adapt(tiny()))
    save_adapter(model, tmp_path / "a")
    before = content(tmp_path / "a")

    def half(new, **_):
        new.mkdir()
        (new / FILE).write_bytes(b"half")
        raise error

    monkeypatch.setattr(model, "save_pretrained", half)
    with pytest.raises((KeyboardInterrupt, OSError)):
        save_adapter(model, tmp_path / "a")
    assert content(tmp_path / "a") == before
    with pytest.raises((KeyboardInterrupt, OSError)):
        save_adapter(model, tmp_path / "new")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_a_folder_is_replaced_whole(tmp_path):
    model = randomise(adapt(tiny(), k=4))
    save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "stale").write_text("of the old run")
    model.add_adapter("two", CTConfig(k=2))
    save_adapter(model, tmp_path / "a", "two")
    assert settings(tmp_path / "a")["k"] == 2
    assert set(content(tmp_path / "a")) == {FILE, "adapter_config.json", "README.md"}
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_what_saving_would_delete_or_cannot_replace_is_refused(tmp_path, monkeypatch):
    model = adapt(tiny())
    save_adapter(model, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "a")
        with pytest.raises(CTError, match=r"a is the folder that this process works in, and saving replaces it; give"):
            save_adapter(model, ".")
    (tmp_path / "a" / "checkpoint-5").mkdir()
    (tmp_path / "a" / "checkpoint-5" / "state").write_text("x")
    with pytest.raises(CTError, match=r"a holds the folder checkpoint-5, which saving would delete; choose another"):
        save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a" / "checkpoint-5" / "state").exists() and [f.name for f in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", (KeyboardInterrupt, OSError("gone")))
def test_an_error_between_the_renames_leaves_the_old_folder(error, tmp_path, monkeypatch):
    model = randomise(adapt(tiny()))
    save_adapter(model, tmp_path / "a")
    before, rename = content(tmp_path / "a"), Path.rename

    def stop(path, target):
        if path.name == "new":
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises((KeyboardInterrupt, OSError)):
        save_adapter(randomise(model, seed=9), tmp_path / "a")
    assert content(tmp_path / "a") == before and [f.name for f in tmp_path.iterdir()] == ["a"]


def test_a_link_stays_and_what_it_means_is_replaced(tmp_path):
    model = randomise(adapt(tiny()))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        save_adapter(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and FILE in content(tmp_path / "real")
    assert {f.name for f in tmp_path.iterdir()} == {"link", "real"}


def test_replacing_puts_the_new_folder_in_place_by_renames(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    replace_folder(tmp_path / "b", tmp_path / "a")
    assert [f.name for f in tmp_path.iterdir()] == ["a"] and content(tmp_path / "a") == {"b": b"b"}


def test_a_folder_that_is_no_adapter_is_not_overwritten(tmp_path):
    model = adapt(tiny())
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("precious", "file"):
        with pytest.raises(CTError, match=rf"{name} exists and is no adapter; choose another place"):
            save_adapter(model, tmp_path / name)
    (tmp_path / "empty").mkdir()
    save_adapter(model, tmp_path / "empty")
    save_adapter(model, tmp_path / "made" / "on" / "the" / "way")


def test_plain_save_pretrained_writes_the_same_without_a_warning(tmp_path):
    model = randomise(adapt(tiny()))
    save_adapter(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "b")
    for file in (FILE, "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_after_a_change_of_k_the_saved_k_is_the_new_one(tmp_path):
    model = randomise(adapt(tiny(), k=4))
    resize(model, {"q_proj": 6, ".*": 3})
    save_adapter(model, tmp_path / "a")
    assert settings(tmp_path / "a")["k"] == [["q_proj", 6], [".*", 3]]
    assert_same_bits(logits(load(tiny(), tmp_path / "a")), logits(model))
