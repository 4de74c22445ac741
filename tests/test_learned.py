"""basis="learned": directions learned from siblings, shared by many adapters, and a start at the siblings' mean."""

from collections import Counter

import pytest
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ctsft import CTConfig, CTError, hotswap, learn_basis, resize, save_adapter
from ctsft.adapter.learned import Learned
from fuzz import changed, outcome
from helpers import (
    SHAPES,
    adapt,
    assert_close,
    assert_exports_do_the_same,
    assert_same_bits,
    coefficients,
    dense,
    ids,
    logits,
    owners,
    randomise,
    tiny,
    twin,
    write_directions,
    write_learned,
)

FORMS = ("diagonal", "core")  # that have amplitudes to start from
Q = "model.layers.0.self_attn.q_proj"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def path(tmp_path):
    return write_learned(tiny(), tmp_path / "shared" / "basis.safetensors")


def learned(path, base=None, **options):
    return adapt(base or tiny(), **{"basis": "learned", "basis_file": str(path), "start": "mean"} | options)


def load(folder, base=None):
    return PeftModel.from_pretrained(base or tiny(), folder).eval()


# ---- the start


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_the_start_is_the_mean_of_the_siblings(shape, form, tmp_path):
    file = write_learned(tiny(shape), tmp_path / "basis.safetensors")
    model, tensors = learned(file, tiny(shape), form=form), load_file(file)
    wanted = tiny(shape)
    for name, layer in owners(model).items():
        u, vh, a = (tensors[f"{name}.{part}"].double() for part in ("u", "vh", "siblings"))
        mean = sum((u[:, :4] * one[:4]) @ vh[:4] for one in a) / len(a)
        assert_close(dense(layer), mean, 1e-6)
        assert not coefficients(model)[name].any()
        weight = wanted.get_submodule(name).weight.data
        weight += (mean if weight.shape == mean.shape and shape != "gpt2" else mean.T).float()
    assert_close(logits(model), logits(wanted), 1e-5)
    assert_close(logits(randomise(model, scale=0.1)), logits(twin(model, tiny(shape))), 1e-5)


def test_zero_is_the_base_to_the_bit(path):
    assert_same_bits(logits(learned(path, start="zero")), logits(tiny()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", [False, True])
def test_it_is_saved_and_read_to_the_same_bits(form, stored, path, tmp_path):
    model = randomise(learned(path, form=form, store_basis=stored), scale=0.1)
    save_adapter(model, tmp_path / "a")
    if stored:
        path.unlink()
    else:
        assert set(load_file(tmp_path / "a" / "adapter_model.safetensors")) == {"ctsft.coefficients", "ctsft.checksum"}
    assert_same_bits(logits(load(tmp_path / "a")), logits(model))


@pytest.mark.parametrize("form", FORMS)
def test_export_and_merge_hold_the_mean(form, path, tmp_path):
    model = randomise(learned(path, form=form), scale=0.1)
    assert_exports_do_the_same(model, tmp_path)


def test_a_change_of_k_cuts_and_brings_back_the_mean(path):
    model = randomise(learned(path), scale=0.1)
    start = owners(model)[Q].ctsft_basis["default"].start
    resize(model, 2)
    assert_same_bits(owners(model)[Q].ctsft_basis["default"].start, start[:2])
    resize(model, 4)
    assert_same_bits(owners(model)[Q].ctsft_basis["default"].start, start)
    assert_close(logits(model), logits(twin(model, tiny())), 1e-5)


def test_adapters_share_directions_and_start_in_memory(path):
    model = learned(path)
    for name, k in (("more", 6), ("fewer", 2)):
        model.add_adapter(name, CTConfig(k=k, basis="learned", basis_file=str(path), start="mean"))
    layer = owners(model)[Q]
    storages = [
        {t.untyped_storage().data_ptr() for t in layer.ctsft_basis[name].tensors().values()}
        for name in ("default", "more", "fewer")
    ]
    assert storages[0] == storages[1] == storages[2] and len(storages[0]) == 3
    assert_same_bits(layer.ctsft_basis["fewer"].start, layer.ctsft_basis["more"].start[:2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("starts", [("mean", "mean"), ("mean", "zero"), ("zero", "mean")])
def test_sums_count_the_mean_as_often_as_the_terms_do(form, starts, path):
    model = randomise(learned(path, form=form, start=starts[0]), scale=0.1)
    model.add_adapter("b", CTConfig(k=4, form=form, basis="learned", basis_file=str(path), start=starts[1]))
    randomise(model, "b", seed=6, scale=0.1)
    model.base_model.add_weighted_adapter(["default", "b"], [0.7, 1.6], "sum")
    for layer in owners(model).values():
        wanted = 0.7 * dense(layer) + 1.6 * dense(layer, "b")
        assert_close(layer.get_delta_weight("sum"), wanted, 1e-5)


def test_numbers_are_not_swapped_under_another_start_or_file(path, tmp_path):
    save_adapter(randomise(learned(path, start="zero")), tmp_path / "zero")
    model = learned(path)
    with pytest.raises(CTError, match="has start='zero' and 'default' has 'mean'"):
        hotswap(model, tmp_path / "zero")
    other = load_file(path)
    other[f"{Q}.siblings"] *= 2  # the same directions, another mean
    save_file(other, tmp_path / "other.safetensors")
    save_adapter(randomise(learned(tmp_path / "other.safetensors")), tmp_path / "other")
    with pytest.raises(CTError, match="has basis_checksum="):
        hotswap(model, tmp_path / "other")
    save_adapter(randomise(learned(path), seed=8), tmp_path / "same")
    hotswap(model, tmp_path / "same")
    assert_same_bits(logits(model), logits(load(tmp_path / "same")))


# ---- the file


def test_the_folder_will_do_and_a_copy_beside_the_adapter_is_found(path, tmp_path):
    model = randomise(learned(path.parent))
    save_adapter(model, tmp_path / "a")
    path.rename(tmp_path / "a" / "basis.safetensors")
    assert_same_bits(logits(load(tmp_path / "a")), logits(model))
    (tmp_path / "a" / "basis.safetensors").unlink()
    with pytest.raises(CTError, match=r"there is no basis_file .*shared nor .*; give the safetensors file .* path may"):
        load(tmp_path / "a")


def test_the_file_beside_an_adapter_stays_when_it_is_saved_again(path, tmp_path):
    model = randomise(learned(path), scale=0.1)
    save_adapter(model, tmp_path / "a")
    path.rename(tmp_path / "a" / "basis.safetensors")
    again = randomise(load(tmp_path / "a"), scale=0.2)
    save_adapter(again, tmp_path / "a")
    assert_same_bits(logits(load(tmp_path / "a")), logits(again))


def test_another_mean_is_another_file(path, tmp_path):
    save_adapter(learned(path), tmp_path / "a")
    tensors = load_file(path)
    tensors[f"{Q}.siblings"] *= 2
    save_file(tensors, path)
    with pytest.raises(CTError, match=r"holds xxh3-\w+ and the adapter was made with xxh3-\w+"):
        load(tmp_path / "a")


def test_a_file_of_orthonormal_directions_has_no_mean(tmp_path):
    file = write_directions(tiny(), tmp_path / "x")
    assert owners(learned(file, start="zero"))
    with pytest.raises(CTError, match=r"\.siblings in basis_file does not hold 4 amplitudes of every sibling"):
        learned(file)


def longer(tensors):
    tensors[f"{Q}.vh"] *= 1.02


def nan(tensors):
    tensors[f"{Q}.siblings"][0, 0] = float("nan")


def few(tensors):
    tensors[f"{Q}.siblings"] = tensors[f"{Q}.siblings"][:, :3].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (longer, r"\.vh in basis_file holds directions whose length is up to 0\.02 off 1"),
        (nan, r"\.siblings in basis_file does not hold 4 amplitudes"),
        (few, r"\.siblings in basis_file does not hold 4 amplitudes"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, path):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    base = tiny()
    with pytest.raises(CTError, match=message):
        learned(path, base)
    assert not owners(base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "learned"}, "basis='learned' needs basis_file"),
        ({"start": "mean"}, "start='mean' sets the amplitudes .* needs basis='learned'"),
        ({"start": "mean", "basis": "learned", "basis_file": "x", "form": "scores"}, "form='diagonal' or 'core'"),
        ({"start": "mean", "basis": "learned", "basis_file": "x", "form": "gains"}, "form='diagonal' or 'core'"),
        ({"start": "median"}, "start='median' is unknown; choose one of zero, mean"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(CTError, match=message):
        get_peft_model(tiny(), CTConfig(**options))


def really_learned(path):
    """What a step teaches, in the file `path`."""
    found = learn_basis(tiny(), {"a": [{"input_ids": ids(1)}], "b": [{"input_ids": ids(1)}]}, k=4, steps=1)
    found.save(path.parent)
    return found


@pytest.mark.parametrize("damage", ["amplitude", "side", "facts"])
def test_a_learned_file_tells_damage_without_an_adapter(damage, path):
    """One number that is as plausible as before, or one fact; a file from before there were seals is read as it is."""
    really_learned(path)
    tensors, notes = load_file(path), notes_of(path)
    if damage == "facts":
        notes["ctsft"] = notes["ctsft"].replace('"steps": 1', '"steps": 7')
    elif damage == "side":  # of unit length still
        tensors[f"{Q}.vh"] = tensors[f"{Q}.vh"].flip(0).contiguous()
    else:
        tensors[f"{Q}.siblings"][0, 0] += 0.001
    save_file(tensors, path, notes)
    for look in (lambda: Learned.read(path), lambda: learned(path)):
        with pytest.raises(CTError, match="is not as it was learned; it is damaged or was edited, take the file anew"):
            look()
    save_file(tensors, path, {"ctsft": notes["ctsft"]})
    assert Learned.read(path.parent).facts.steps == (7 if damage == "facts" else 1)
    assert owners(learned(path))


def notes_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_changed_file_is_the_same_or_one_sentence(path):
    """Seeded changes to the file: what is read is what was learned, or it is refused, and nothing else happens."""
    before = really_learned(path).u
    data, counts = path.read_bytes(), Counter()
    length = 8 + int.from_bytes(data[:8], "little")
    for seed in range(40):
        header = changed(data[8:length], seed)
        whole = len(header).to_bytes(8, "little") + header + data[length:]
        path.write_bytes(whole if seed % 2 else changed(data, seed))
        for look in (lambda: Learned.read(path).agreement(), lambda: learned(path)):
            counts[refused := isinstance(outcome(look, 20), CTError)] += 1
            if not refused:
                assert_same_bits(Learned.read(path).u[Q], before[Q])
    assert counts[True] > 60 and counts[False] > 0
