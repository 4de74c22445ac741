"""basis="file": directions that lie in a user's safetensors file, shared by many adapters."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ctsft import CTConfig, CTError, resize, save_adapter
from ctsft.adapter.seal import hash_settings
from helpers import (
    FORMS,
    SHAPES,
    adapt,
    assert_close,
    assert_exports_do_the_same,
    assert_same_bits,
    directions,
    logits,
    owners,
    randomise,
    tiny,
    twin,
    write_directions,
)

FILE = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def path(tmp_path):
    """A file with directions for all matrices of the tiny Llama."""
    return write_directions(tiny(), tmp_path / "directions.safetensors")


def on_file(path, base=None, **options):
    return adapt(base or tiny(), basis="file", basis_file=str(path), **options)


def load(folder, base=None):
    return PeftModel.from_pretrained(base or tiny(), folder).eval()


def storages(model, adapter="default"):
    bases = [m.ctsft_basis[adapter] for m in owners(model, adapter).values()]
    return {t.untyped_storage().data_ptr() for b in bases for t in b.tensors().values()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_directions_are_those_of_the_file(shape, form, tmp_path):
    written = directions(tiny(shape))
    save_file(written, tmp_path / "a")
    model = on_file(tmp_path / "a", tiny(shape), form=form)
    for name, layer in owners(model).items():
        basis = layer.ctsft_basis["default"]
        assert_same_bits(basis.vh, written[f"{name}.vh"][:4])
        if form == "scores":
            assert basis.u is None
        else:
            assert_same_bits(basis.u, written[f"{name}.u"][:, :4])
    assert_close(logits(randomise(model)), logits(twin(model, tiny(shape))), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_file_is_shared_and_the_adapter_holds_its_checksum_only(form, path, tmp_path):
    model = randomise(on_file(path, form=form))
    save_adapter(model, tmp_path / "a")
    with safe_open(tmp_path / "a" / FILE, "pt") as file:
        assert set(file.keys()) == {"ctsft.coefficients", "ctsft.checksum"}
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["basis_checksum"].startswith("xxh3-") and saved["stored_basis"] is False
    assert saved["basis_file"] == str(path)
    assert_same_bits(logits(load(tmp_path / "a")), logits(model))
    save_adapter(randomise(on_file(path, form="core"), seed=9), tmp_path / "b")
    other = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert other["basis_checksum"] == saved["basis_checksum"]


@pytest.mark.parametrize("form", FORMS)
def test_it_is_exported_and_merged_like_any_other(form, path, tmp_path):
    model = randomise(on_file(path, form=form), scale=0.1)
    assert_exports_do_the_same(model, tmp_path)


def test_no_other_adapter_has_fields_of_a_file(tmp_path):
    save_adapter(adapt(tiny()), tmp_path / "a")
    assert not [n for n in json.loads((tmp_path / "a" / "adapter_config.json").read_text()) if n.startswith("basis_f")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_of_one_model_share_the_directions_in_memory(dtype, path):
    model = on_file(path, k=4, basis_dtype=dtype)
    model.add_adapter("same", CTConfig(k=4, basis="file", basis_file=str(path), basis_dtype=dtype))
    model.add_adapter("fewer", CTConfig(k=2, form="core", basis="file", basis_file=str(path), basis_dtype=dtype))
    model.add_adapter("more", CTConfig(k=6, basis="file", basis_file=str(path), basis_dtype=dtype))
    assert storages(model) == storages(model, "same") == storages(model, "fewer") == storages(model, "more")
    for few, more in zip(owners(model, "fewer").values(), owners(model, "more").values(), strict=True):
        assert_same_bits(few.ctsft_basis["fewer"].vh, more.ctsft_basis["more"].vh[:2])


def test_other_files_are_not_shared_whatever_their_name(path, tmp_path):
    model = on_file(path)
    write_directions(tiny(), path, seed=1)  # the same path, other directions
    model.add_adapter("b", CTConfig(k=4, basis="file", basis_file=str(path)))
    assert not storages(model) & storages(model, "b")
    copied = shutil.copy(path, tmp_path / "copy")
    model.add_adapter("third", CTConfig(k=4, basis="file", basis_file=str(copied)))  # another path, the same directions
    assert storages(model, "third") == storages(model, "b")


def test_a_file_that_is_written_anew_changes_no_adapter_in_memory(path):
    model = on_file(path)
    before = [m.ctsft_basis["default"].vh.clone() for m in owners(model).values()]
    with path.open("r+b") as file:
        file.seek(-20_000, 2)
        file.write(bytes(20_000))
    for vh, layer in zip(before, owners(model).values(), strict=True):
        assert_same_bits(layer.ctsft_basis["default"].vh, vh)


def test_an_adapter_that_is_loaded_beside_another_shares_too(path, tmp_path):
    save_adapter(randomise(on_file(path)), tmp_path / "a")
    model = load(tmp_path / "a")
    model.load_adapter(tmp_path / "a", "b")
    assert storages(model) == storages(model, "b")


def test_a_path_is_looked_up_as_given_then_beside_the_adapter(path, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.move(path, "mine")
    model = randomise(on_file("mine"))
    save_adapter(model, tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CTError, match=r"there is no basis_file mine nor .*a/mine nor .*a/basis.*; give the safetensors file"
    ):
        load(tmp_path / "a")
    shutil.move(tmp_path / "work" / "mine", tmp_path / "a" / "mine")
    loaded = load(tmp_path / "a")
    assert_same_bits(logits(loaded), logits(model))
    save_adapter(loaded, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["basis_file"] == "mine"
    resize(loaded, 2)  # also found then


def test_k_changes_in_place_up_to_what_the_file_holds(path):
    model = randomise(on_file(path, k=3))
    before = logits(model)
    resize(model, 8)
    assert_close(logits(model), before, 1e-5)
    with pytest.raises(CTError, match="k=9 is more than the 8 directions of"):
        resize(model, 9)


def test_a_stored_basis_needs_no_file(path, tmp_path):
    model = randomise(on_file(path, store_basis=True))
    save_adapter(model, tmp_path / "a")
    path.unlink()
    assert_same_bits(logits(load(tmp_path / "a")), logits(model))


def test_directions_rounded_to_bfloat16_are_taken(path):
    save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
    layer = next(iter(owners(on_file(path)).values()))
    assert layer.ctsft_basis["default"].u.dtype == torch.float32
    assert_same_bits(layer.ctsft_basis["default"].u, layer.ctsft_basis["default"].u.bfloat16().float())


def test_a_path_object_will_do(path, tmp_path):
    model = get_peft_model(tiny(), CTConfig(k=2, basis="file", basis_file=path))
    save_adapter(model, tmp_path / "a")
    assert model.peft_config["default"].basis_file == str(path)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "file"}, "basis='file' needs basis_file, the safetensors file"),
        ({"basis_file": "x"}, "basis_file is read for basis='file' and basis='learned' only"),
    ],
    ids=str,
)
def test_the_kind_and_the_file_need_each_other(options, message):
    with pytest.raises(CTError, match=message):
        CTConfig(**options)


Q = "model.layers.0.self_attn.q_proj"


def missing(tensors):
    del tensors[f"{Q}.vh"]


def missing_side(tensors):
    del tensors[f"{Q}.u"]


def too_few(tensors):
    tensors[f"{Q}.vh"] = tensors[f"{Q}.vh"][:3].contiguous()


def transposed(tensors):
    tensors[f"{Q}.u"] = tensors[f"{Q}.u"][:4].contiguous()


def flat(tensors):
    tensors[f"{Q}.u"] = tensors[f"{Q}.u"].flatten()


def not_a_number(tensors):
    tensors[f"{Q}.u"][1, 1] = float("nan")


def whole_numbers(tensors):
    tensors[f"{Q}.vh"] = tensors[f"{Q}.vh"].long()


def scaled(tensors):
    tensors[f"{Q}.vh"] *= 1.02


def oblique(tensors):
    tensors[f"{Q}.u"][:, 1] += 0.02 * tensors[f"{Q}.u"][:, 0]


WRONG = {
    missing: rf"basis_file has no {Q}\.vh; adapt only modules that it has directions for",
    missing_side: rf"basis_file has no {Q}\.u; adapt only",
    too_few: rf"{Q}\.vh in basis_file is \(3, 16\); this model and k=4 need \(4, 16\), or more directions",
    transposed: rf"{Q}\.u in basis_file is \(4, 16\); this model and k=4 need \(16, 4\)",
    flat: rf"{Q}\.u in basis_file is \(256,\); this model",
    not_a_number: rf"{Q}\.u in basis_file has NaN, infinite or whole numbers",
    whole_numbers: rf"{Q}\.vh in basis_file has .* whole numbers \(torch\.int64\)",
    scaled: rf"{Q}\.vh in basis_file is not orthonormal: products .* up to 0\.04 off .* at most 0\.01",
    oblique: rf"{Q}\.u in basis_file is not orthonormal: products of its directions are up to 0\.02",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda f: f.__name__)
def test_a_file_that_does_not_fit_is_refused_with_a_sentence_and_nothing_changed(change, path):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    base = tiny()
    with pytest.raises(CTError, match=WRONG[change]) as caught:
        on_file(path, base)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not owners(base)


def test_scores_read_the_input_side_only(path):
    tensors = {n: t for n, t in load_file(path).items() if n.endswith(".vh")}
    save_file(tensors, path)
    assert owners(on_file(path, form="scores"))
    with pytest.raises(CTError, match=r"has no .*q_proj\.u"):
        on_file(path)


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "text").write_text("no safetensors at all, but long enough to look like a header of some length")
    for name, message in (("text", "cannot be read as safetensors"), ("gone", "there is no basis_file .*gone; give")):
        with pytest.raises(CTError, match=message):
            on_file(tmp_path / name)


def test_another_file_or_changed_directions_are_refused_on_loading(path, tmp_path):
    save_adapter(randomise(on_file(path)), tmp_path / "a")
    whole = load_file(path)
    for change in (lambda t: t[f"{Q}.u"].mul_(-1), lambda t: t.update({f"{Q}.vh": t[f"{Q}.vh"].flip(0)}), None):
        tensors = {n: t.clone() for n, t in whole.items()}
        if change:
            change(tensors)
        else:
            tensors = directions(tiny(), seed=1)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
        with pytest.raises(CTError, match=r"holds xxh3-\w+ and the adapter was made with xxh3-\w+: its directions are"):
            load(tmp_path / "a")
    save_file(whole, path)
    load(tmp_path / "a")
    settings = tmp_path / "a" / "adapter_config.json"
    forged = json.loads(settings.read_text())
    save_file(directions(tiny(), seed=1), path)
    forged["basis_checksum"] = on_file(path).peft_config["default"].basis_checksum
    settings.write_text(json.dumps(forged | {"settings_hash": hash_settings(forged)}))
    with pytest.raises(CTError, match="differ from those that the adapter was trained on"):  # by every matrix's own
        load(tmp_path / "a")


def test_a_config_holds_to_the_file_that_it_was_first_used_with(path):
    config = CTConfig(k=2, basis="file", basis_file=str(path))
    get_peft_model(tiny(), config)
    write_directions(tiny(), path, seed=1)
    with pytest.raises(CTError, match="its directions are others; give the file that it was made with"):
        get_peft_model(tiny(), config)
