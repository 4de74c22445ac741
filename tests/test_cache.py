import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import ctsft.adapter.bases
import ctsft.spectral.cache
import ctsft.spectral.decompose
import ctsft.spectral.kinds
from ctsft import CTConfig, resize, save_adapter
from ctsft.adapter.bases import prepare
from ctsft.spectral.basis import Basis
from ctsft.spectral.cache import file_of, key_of, read_bases, write_bases
from ctsft.tune.trainer import extra_memory
from helpers import adapt, assert_same_bits, logits, owners, randomise, tiny

WIDE = {"hidden_size": 520, "intermediate_size": 540, "num_hidden_layers": 1}
TARGETS = ["q_proj", "up_proj", "k_proj"]  # (520, 520) and (540, 520), which are iterated; (260, 520), which is not


@pytest.fixture(autouse=True)
def bases(tmp_path, monkeypatch):
    """A cache folder of the test's own, in which every basis is kept; the folder of its files."""
    monkeypatch.setenv("CTSFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ctsft.adapter.bases, "WORTH_KEEPING", 0.0)
    return tmp_path / "cache" / "bases"


@pytest.fixture
def from_500(monkeypatch):
    monkeypatch.setattr(ctsft.spectral.decompose, "ITERATED_FROM", 500)


@pytest.fixture
def wide(from_500):
    return lambda seed=0: tiny(seed=seed, **WIDE)


def refuse(*_):
    raise AssertionError("a basis was made")


def count_made(monkeypatch):
    made, make = [], ctsft.spectral.kinds.weight_basis
    monkeypatch.setattr(ctsft.spectral.kinds, "weight_basis", lambda w, *rest: made.append(w.shape) or make(w, *rest))
    return made


def all_bases(model, adapter="default"):
    return {n: m.ctsft_basis[adapter] for n, m in owners(model, adapter).items()}


def assert_same_bases(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for one, other in zip(a[name].tensors().values(), b[name].tensors().values(), strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("form", ["diagonal", "core", "scores", "gains"])
@pytest.mark.parametrize("choice", ["top", "bottom", "random"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_start_makes_no_basis_and_has_the_same_bits(form, choice, dtype, bases, monkeypatch):
    options = {"form": form, "weight_from": choice, "basis_dtype": dtype, "seed": 3}
    first = all_bases(adapt(tiny(), **options))
    assert len(list(bases.iterdir())) == 1
    monkeypatch.setattr(ctsft.spectral.kinds, "weight_basis", refuse)
    assert_same_bases(all_bases(adapt(tiny(), **options)), first)
    assert (next(iter(first.values())).u is None) == (form == "scores")


def test_all_forms_and_dtypes_read_one_file(bases, monkeypatch):
    adapt(tiny())
    monkeypatch.setattr(ctsft.spectral.kinds, "weight_basis", refuse)
    for options in ({"form": "core"}, {"form": "scores"}, {"basis_dtype": "bfloat16"}, {"seed": 5}):
        adapt(tiny(), **options)
    assert len(list(bases.iterdir())) == 1


def test_whatever_decides_the_bits_is_in_the_key(bases, monkeypatch):
    adapt(tiny())
    for base, options in (
        (tiny(seed=1), {}),
        (tiny(), {"weight_from": "bottom"}),
        (tiny(), {"weight_from": "random"}),
        (tiny(), {"weight_from": "random", "seed": 1}),
        (tiny(), {"target_modules": ["q_proj"]}),
    ):
        before = len(list(bases.iterdir()))
        adapt(base, **options)
        assert len(list(bases.iterdir())) == before + 1
    keys = {key_of("x"), key_of("y")}
    monkeypatch.setattr(ctsft.spectral.cache, "VERSION", 2)
    keys.add(key_of("x"))
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.add(key_of("x"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
    assert len(keys | {key_of("x")}) == 5


@pytest.mark.parametrize("basis", ["random", "universal", "gradient", "activation"])
def test_other_bases_are_not_kept(basis, bases):
    adapt(tiny(), basis=basis)
    assert not bases.exists()


def test_small_models_leave_no_file(bases, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("CTSFT_CACHE", str(bases.parent))
    adapt(tiny())
    assert not bases.parent.exists()


def test_it_can_be_switched_off(bases, monkeypatch):
    monkeypatch.setenv("CTSFT_BASIS_CACHE", "0")
    adapt(tiny())
    assert not bases.exists()


def test_fewer_directions_are_read_from_a_file_of_more_only_where_the_bits_are_the_same(wide, monkeypatch):
    monkeypatch.setenv("CTSFT_BASIS_CACHE", "0")
    fresh = {k: all_bases(adapt(wide(), k=k, target_modules=TARGETS)) for k in (10, 64)}
    monkeypatch.delenv("CTSFT_BASIS_CACHE")
    adapt(wide(), k=64, target_modules=TARGETS)
    made = count_made(monkeypatch)
    for k, expected in ((10, [(260, 520)]), (64, [])):
        found = all_bases(adapt(wide(), k=k, target_modules=TARGETS))
        assert_same_bases(found, fresh[k])
        assert made == expected
        made.clear()
        for basis in found.values():  # no memory of directions that are not asked for
            assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in basis.tensors().values())


def test_the_file_holds_the_most_directions_asked_for_so_far(wide, bases, monkeypatch):
    def kept():
        (file,) = bases.iterdir()
        with ctsft.spectral.cache.safe_open(file, "pt") as opened:
            return {n.split(".")[-2]: opened.get_slice(n).get_shape()[0] for n in opened.keys() if n.endswith("vh")}  # noqa: SIM118

    adapt(wide(), k={"q_proj": 8, ".*": 20}, target_modules=TARGETS)
    assert kept() == {"q_proj": 8, "up_proj": 20, "k_proj": 20}
    made = count_made(monkeypatch)
    adapt(wide(), k={"q_proj": 30, ".*": 20}, target_modules=TARGETS)
    assert made == [(520, 520)] and kept() == {"q_proj": 30, "up_proj": 20, "k_proj": 20}
    adapt(wide(), k=4, target_modules=TARGETS)
    assert kept() == {"q_proj": 30, "up_proj": 20, "k_proj": 20}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_read_is_mapped_and_lies_as_torch_puts_it(bases):
    for count in range(1, 10):
        key = key_of(count)
        written = {f"m{i}": Basis(torch.randn(32, 4), torch.randn(4, 16)) for i in range(count)}
        write_bases(key, written)
        found = read_bases(key)
        assert_same_bases(found, written)
        assert str(file_of(key)) in Path("/proc/self/maps").read_text()
        assert {t.data_ptr() % 64 for b in found.values() for t in b.tensors().values()} == {0}


def truncated(file, other):
    file.write_bytes(file.read_bytes()[:-10])


def empty(file, other):
    file.write_bytes(b"")


def flipped(file, other):
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def foreign(file, other):
    shutil.copy(other, file)


def text(file, other):
    file.write_text("no safetensors at all, but long enough to look like a header of some length")


@pytest.mark.parametrize("damage", [truncated, empty, flipped, foreign, text])
def test_a_bad_file_is_told_of_and_replaced(damage, bases, monkeypatch):
    first = all_bases(adapt(tiny()))
    (file,) = bases.iterdir()
    adapt(tiny(seed=1))
    (other,) = set(bases.iterdir()) - {file}
    damage(file, other)
    with pytest.warns(UserWarning, match="cannot be used .*: the bases are made anew") as told:
        again = prepare(tiny(), CTConfig(k=4)).bases
    assert len(told) == 1
    assert_same_bases(again, first)
    monkeypatch.setattr(ctsft.spectral.kinds, "weight_basis", refuse)
    assert_same_bases(all_bases(adapt(tiny())), first)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    first = all_bases(adapt(tiny()))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CTSFT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be kept in .*file/bases .*CTSFT_BASIS_CACHE=0") as told:
        again = prepare(tiny(), CTConfig(k=4)).bases
    assert len(told) == 1
    assert_same_bases(again, first)


def test_a_full_disk_leaves_nothing_behind(bases, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        prepare(tiny(), CTConfig(k=4))
    assert list(bases.iterdir()) == []


def test_an_adapter_loads_on_bases_recomputed_with_other_threads(wide, tmp_path, monkeypatch):
    monkeypatch.setenv("CTSFT_BASIS_CACHE", "0")
    model = randomise(adapt(wide(), k=64, target_modules=TARGETS))
    save_adapter(model, tmp_path / "a")
    torch.set_num_threads(2)
    try:
        loaded = PeftModel.from_pretrained(wide(), tmp_path / "a")
    finally:
        torch.set_num_threads(1)
    assert_same_bases(all_bases(loaded), all_bases(model))
    assert_same_bits(logits(loaded.eval()), logits(model))


def test_an_adapter_trained_on_kept_bases_loads_on_recomputed_ones(wide, tmp_path, monkeypatch):
    adapt(wide(), k=64, target_modules=TARGETS)
    model = randomise(adapt(wide(), k=20, target_modules=TARGETS))
    save_adapter(model, tmp_path / "a")
    monkeypatch.setenv("CTSFT_BASIS_CACHE", "0")
    assert_same_bits(logits(PeftModel.from_pretrained(wide(), tmp_path / "a").eval()), logits(model))


def test_resize_reads_from_the_file(wide, monkeypatch):
    adapt(wide(), k=64, target_modules=["q_proj", "up_proj"])
    model = adapt(wide(), k=8, target_modules=["q_proj", "up_proj"])
    monkeypatch.setattr(ctsft.spectral.kinds, "weight_basis", refuse)
    for k in (40, 64, 5):
        resize(model, k)
        for basis in all_bases(model).values():
            assert basis.k == k and basis.u.untyped_storage().nbytes() == basis.u.numel() * 4


# ---- several adapters of one model


def storages(model, adapter):
    return {t.untyped_storage().data_ptr() for b in all_bases(model, adapter).values() for t in b.tensors().values()}


def share_everything(model, one, other):
    return bool(storages(model, one)) and storages(model, one) == storages(model, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("basis", ["weight", "random", "universal"])
def test_two_adapters_of_one_model_share_one_basis(basis, dtype, monkeypatch):
    monkeypatch.setenv("CTSFT_BASIS_CACHE", "0")
    options = {"k": 4, "basis": basis, "basis_dtype": dtype}
    model = adapt(tiny(), **options)
    alone, bytes_alone = all_bases(model), extra_memory(model, None)
    with monkeypatch.context() as patch:
        patch.setattr(ctsft.spectral.kinds, "weight_basis", refuse)
        model.add_adapter("b", CTConfig(**options))
    assert share_everything(model, "default", "b")
    assert_same_bases(all_bases(model, "b"), alone)
    assert extra_memory(model, None) == bytes_alone
    randomise(model, "b")
    model.set_adapter("b")
    model.delete_adapter("default")
    model.eval()
    assert_same_bases(all_bases(model, "b"), alone)
    resize(model, 2, "b")
    assert {b.k for b in all_bases(model, "b").values()} == {2}


@pytest.mark.parametrize("ks", [(64, 10), (10, 64), (10, 64, 30)])
def test_fewer_directions_are_a_view_of_more(ks, wide, monkeypatch):
    monkeypatch.setenv("CTSFT_BASIS_CACHE", "0")
    options = {"target_modules": ["q_proj", "up_proj"]}
    fresh = {k: all_bases(adapt(wide(), k=k, **options)) for k in ks}
    model = randomise(adapt(wide(), k=ks[0], **options))
    before = logits(model)
    for k in ks[1:]:
        model.add_adapter(f"k{k}", CTConfig(k=k, **options))
    names = dict(zip(ks, ["default", *(f"k{k}" for k in ks[1:])], strict=True))
    for k, name in names.items():
        assert_same_bases(all_bases(model, name), fresh[k])
        assert share_everything(model, name, names[64])
    assert_same_bits(logits(model.eval()), before)
    resize(model, 5, names[10])
    assert_same_bases(all_bases(model, names[64]), fresh[64])


def test_fewer_directions_of_an_exact_basis_are_made_alone():
    """A view of more would have other last bits than a computation alone, and so than a fresh process."""
    model = adapt(tiny(), k=4)
    model.add_adapter("b", CTConfig(k=2))
    assert not storages(model, "default") & storages(model, "b")
    assert_same_bases(all_bases(model, "b"), all_bases(adapt(tiny(), k=2)))


def test_forms_share_the_side_that_both_have():
    model = adapt(tiny(), k=4)
    model.add_adapter("b", CTConfig(k=4, form="scores"))
    for one, other in zip(all_bases(model).values(), all_bases(model, "b").values(), strict=True):
        assert other.u is None and other.vh.data_ptr() == one.vh.data_ptr()
    model.add_adapter("other", CTConfig(k=4, form="core"))
    assert share_everything(model, "default", "other")


@pytest.mark.parametrize(
    "other",
    [{"weight_from": "bottom"}, {"basis": "random"}, {"basis_dtype": "bfloat16"}, {"target_modules": ["q_proj"]}],
    ids=str,
)
def test_other_directions_are_not_shared(other):
    model = adapt(tiny(), k=4)
    model.add_adapter("b", CTConfig(**{"k": 4} | other))
    assert not storages(model, "default") & storages(model, "b")
    assert_same_bases(all_bases(model, "b"), all_bases(adapt(tiny(), **{"k": 4} | other)))


def test_bases_of_weights_that_have_changed_since_are_not_shared():
    model = adapt(tiny(), k=4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(1.5)
    model.add_adapter("b", CTConfig(k=4))
    assert not storages(model, "default") & storages(model, "b")
