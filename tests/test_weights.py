"""Weights, their fingerprint beside the plain one that benchmarks/universal.py times."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D
from universal import old_fingerprint

from ctsft.errors import CTError
from ctsft.spectral import weights
from ctsft.spectral.decompose import principal_directions
from ctsft.spectral.weights import (
    CHUNK,
    check_finite,
    checked,
    clean_name,
    fingerprint,
    gram_of,
    lower_product,
    matrices,
    matrix,
    rows,
    takes_part_transposed,
    universal_gram,
    universal_members,
    width,
)
from helpers import SHAPES, adapt, assert_same_bits, tiny


def test_a_matrix_is_seen_as_output_by_input_whatever_holds_it():
    linear, conv, embedding = nn.Linear(3, 5), Conv1D(5, 3), nn.Embedding(7, 4)
    assert [matrix(m).shape for m in (linear, conv, embedding)] == [(5, 3), (5, 3), (7, 4)]
    x = torch.randn(2, 3)
    assert torch.allclose(conv(x), x @ matrix(conv).T + conv.bias)
    assert matrix(conv).data_ptr() == conv.weight.data_ptr()
    assert torch.equal(matrix(conv, torch.zeros(3, 5)), torch.zeros(5, 3))


def test_a_clean_name_is_that_of_the_bare_model():
    assert clean_name("base_model.model.model.layers.0._orig_mod.q") == "model.layers.0.q"
    assert clean_name("_fsdp_wrapped_module.a._fsdp_wrapped_module.b") == "a.b"


def broken(change):
    module = nn.Linear(3, 2)
    change(module)
    return module


def put(value):
    return broken(lambda m: m.weight.data.view(-1)[3].fill_(value))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.LayerNorm(3), r"the_name is a LayerNorm; CT-SFT adapts Linear, Conv1D and Embedding, so leave it out"),
        (nn.Linear(3, 2, device="meta"), r"the_name has its weight on the meta device; load the model's weights"),
        (put(float("nan")), r"the_name has NaN or infinite weights; the checkpoint is damaged"),
        (put(float("-inf")), r"the_name has NaN or infinite weights; the checkpoint is damaged"),
        (
            broken(lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), False))),
            r"the_name is quantised \(torch.int8\); load the model in bfloat16 or float32",
        ),
        (
            nn.Linear(3, 2).to(torch.float8_e5m2),
            r"the_name is quantised \(torch.float8_e5m2\); load the model in bfloat16 or float32",
        ),
        (
            broken(lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(0)))),
            r"the_name holds a sharded or empty weight; gather it",
        ),
    ],
    ids=("layer norm", "meta", "nan", "infinite", "integers", "eight bits", "sharded"),
)
def test_what_has_no_spectrum_is_refused(module, message):
    with pytest.raises(CTError, match=message):
        checked("the_name", module)


def test_width_is_that_of_the_input_embedding():
    assert width(tiny()) == 16
    assert width(adapt(tiny(), target_modules=["embed_tokens"])) == 16
    with pytest.raises(CTError, match="needs a transformers model"):
        width(nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("name", "shape", "transposed"),
    [
        ("q_proj", (16, 16), False),
        ("o_proj", (16, 16), True),
        ("k_proj", (8, 16), False),
        ("down_proj", (16, 24), True),
        ("x.c_proj", (16, 16), True),
        ("embed_tokens", (37, 16), False),
    ],
)
def test_a_matrix_takes_part_with_the_side_on_the_residual_stream(name, shape, transposed):
    w = torch.randn(shape)
    assert takes_part_transposed(name, w.shape, 16) == transposed
    assert torch.equal(rows(name, w, 16), w.T if transposed else w)


def test_a_matrix_off_the_residual_stream_has_no_universal_basis():
    with pytest.raises(CTError, match=r"inner \(8 x 24\) has no side of width d_model = 16"):
        takes_part_transposed("inner", torch.Size((8, 24)), 16)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_matrix_is_listed_once_and_adapters_change_nothing(shape):
    base = tiny(shape)
    names = [n for n, _ in matrices(base)]
    assert len(names) == len({id(m.weight) for _, m in matrices(base)}) == len(set(names))
    assert not {"lm_head", "head"} & set(names)  # tied to the embedding
    model = adapt(tiny(shape), modules_to_save=["ln_f", "norm"])
    assert [n for n, _ in matrices(model)] == names


def test_a_module_saved_whole_is_still_listed_by_its_own_name():
    base = tiny(tie_word_embeddings=False)
    names = [n for n, _ in matrices(base)]
    model = adapt(base, modules_to_save=["lm_head"])
    assert [n for n, _ in matrices(model)] == names
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 1
    listed = dict(matrices(model))["lm_head"]
    assert_same_bits(listed.weight, tiny(tie_word_embeddings=False).lm_head.weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_universal_directions_are_those_of_all_rows_stacked(shape):
    base = tiny(shape)
    stacked = []
    for name, module in base.named_modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) and name not in ("lm_head", "head"):
            w = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().double()
            inner = w.shape[0] == 16 and name.split(".")[-1] in ("o_proj", "down_proj", "c_proj", "proj", "down")
            stacked.append(w.T if inner else w)
    _, s, vh = torch.linalg.svd(torch.cat(stacked), full_matrices=False)
    gram = universal_gram(universal_members(base, 16), 16)
    found = principal_directions(gram, 16)
    assert torch.allclose((found @ gram @ found.T).diagonal(), s**2)
    assert torch.allclose((found @ vh.T).abs(), torch.eye(16, dtype=torch.float64), atol=1e-8)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_a_gram_matrix_of_pieces_has_the_bits_of_the_plain_sum_whatever_the_threads(dtype):
    pieces = [draw(n, 24, dtype=dtype, seed=n) for n in (1, 40, 33, 7, 64)] + [draw(24, 50, dtype=dtype).T]
    plain = torch.zeros(24, 24, dtype=torch.float64)
    for piece in pieces:
        plain += piece.double().T @ piece.double()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 9):
            torch.set_num_threads(threads)
            found = gram_of(iter(pieces), 24)
            assert_same_bits(found.tril(), plain.tril())
            assert_same_bits(found, found.T)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("width", (9, 16, 31, 64, 65))
def test_a_wide_gram_matrix_is_a_triangle_and_its_mirror(monkeypatch, width):
    monkeypatch.setattr(weights, "WHOLE", 8)
    monkeypatch.setattr(weights, "BLOCK", 8)
    for piece in (draw(40, width), draw(width, 40).T):
        whole = piece.double().T @ piece.double()
        assert torch.allclose(lower_product(piece).tril(), whole.tril(), rtol=1e-13, atol=1e-13)
        found = gram_of([piece, piece], width)
        assert torch.allclose(found, 2 * whole, rtol=1e-13, atol=1e-13)
        assert_same_bits(found, found.T)


def test_few_pieces_are_in_memory_at_a_time(monkeypatch):
    monkeypatch.setattr(weights, "WORKERS", 2)
    alive, most = set(), 0

    def pieces():
        nonlocal most
        for i in range(40):
            piece = draw(3, 4, seed=i)
            alive.add(i)
            weakref.finalize(piece, alive.discard, i)
            most = max(most, len(alive))
            yield piece

    gram_of(pieces(), 4)
    assert most <= 2 + 3 and not alive  # in work or waiting, the one drawn and the one before it


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8))
@pytest.mark.parametrize("shape", ((), (0,), (0, 3), (1, 1), (5, 7), (3, CHUNK // 3), (2, CHUNK // 2), (3, CHUNK + 1)))
def test_a_fingerprint_in_chunks_is_that_of_the_whole(dtype, shape):
    w = draw(*shape).mul(9).to(dtype)
    views = [w]
    if w.ndim == 2:
        views += [w.T, w[:, ::2], w[::2].T, nn.Parameter(w.float()).to(dtype), w[:, :1].expand(-1, 4)]
    for view in views:
        assert fingerprint([("b", w), ("a", view)]) == old_fingerprint([("b", w), ("a", view)])


def test_a_fingerprint_stays_what_adapters_on_disk_carry():
    w = torch.arange(-3, 3).view(2, 3) / 4
    assert fingerprint([("a", w), ("b", w.T.bfloat16())]) == "xxh3-b5e782e86ff4c46babc2fc8c66d333bc"
    assert fingerprint([("a", w.double())]) == "xxh3-00d7964672271eb8c40e60b9fb7b7e34"


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(
    st.sampled_from(FLOATS),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.lists(
        st.tuples(
            st.integers(0), st.sampled_from((torch.nan, -torch.nan, torch.inf, -torch.inf, "max", "min", "tiny", 0.0))
        ),
        max_size=3,
    ),
)
def test_every_nan_and_infinity_is_found_and_nothing_else(dtype, height, width, turned, put):
    info = torch.finfo(dtype)
    w = draw(height, width, dtype=dtype)
    for place, value in put:
        number = {"max": info.max, "min": info.min, "tiny": info.smallest_normal / 2}.get(value, value)
        w.view(-1)[place % w.numel()] = number
    view = w.T if turned else w
    if bool(torch.isfinite(w).all()):
        check_finite("w", view)
    else:
        with pytest.raises(CTError, match="w has NaN or infinite weights"):
            check_finite("w", view)


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_finite_weights_are_no_false_alarm_and_one_bad_one_is_found_anywhere(dtype):
    w = torch.full((300, 1000), torch.finfo(dtype).max, dtype=dtype)
    check_finite("w", w)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 1, 31, 77_777, 262_144, 299_998, 299_999):
            w.view(-1)[place] = bad
            with pytest.raises(CTError, match="NaN or infinite"):
                check_finite("w", w)
            w.view(-1)[place] = torch.finfo(dtype).min
    check_finite("w", w)


def test_a_fingerprint_is_of_names_shapes_and_exact_values():
    w = torch.randn(4, 6)
    mark = fingerprint([("a", w), ("b", w)])
    assert mark.startswith("xxh3-") and len(mark) == 5 + 32
    assert fingerprint([("b", w.clone()), ("a", w)]) == mark  # in any order
    nudged = w.clone()
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(9.0))
    others = [[("a", w)], [("a", w), ("c", w)], [("a", w), ("b", nudged)], [("a", w), ("b", w.view(6, 4))]]
    others.append([("a", w), ("b", w.bfloat16())])
    assert len({mark, *map(fingerprint, others)}) == 6


def test_a_fingerprint_does_not_depend_on_dtype_or_layout_of_the_same_values():
    w = torch.randn(4, 6).bfloat16()
    mark = fingerprint([("a", w)])
    assert fingerprint([("a", w.float())]) == mark
    assert fingerprint([("a", w.T.contiguous().T)]) == mark
    assert fingerprint([("a", w.double())]) != mark


def test_rounding_the_weights_changes_the_fingerprint():
    base, rounded = tiny(), tiny(dtype=torch.bfloat16)
    marks = {fingerprint((n, m.weight) for n, m in matrices(x)) for x in (base, tiny(), rounded)}
    assert len(marks) == 2


def test_a_linear_that_is_not_torch_s_own_is_told_as_such():
    special = type("Linear", (nn.Module,), {"__module__": "quantised.nn"})()
    with pytest.raises(CTError, match=r"q_proj is a quantised\.nn\.Linear, not torch's own; CT-SFT adapts Linear"):
        checked("q_proj", special)
