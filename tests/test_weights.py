import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ctsft.errors import CTError
from ctsft.spectrum import principal_directions
from ctsft.weights import (
    checked,
    clean_name,
    fingerprint,
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
            broken(lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(0)))),
            r"the_name holds a sharded or empty weight; gather it",
        ),
    ],
    ids=("layer norm", "meta", "nan", "infinite", "integers", "sharded"),
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
