"""The loss against every token alone, and what a batch shares against the same batch run whole."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from ctsft.adapter import loss as module
from ctsft.adapter.loss import attends_to_all, bare, drops, shared, summed_loss
from ctsft.tune.measure import collate
from helpers import HEAD, SHAPES, adapt, coefficients, ids, randomise, slow_loss, tiny


def rows_of(lengths, begin=0, completion=None):
    """Random rows that begin with the same `begin` tokens; labels on the last `completion` tokens, or on all."""
    made = []
    for i, n in enumerate(lengths):
        tokens = [*ids(1, begin, seed=99)[0].tolist(), i + 1, *ids(1, n - begin - 1, seed=i)[0].tolist()]
        skip = 0 if completion is None else n - completion
        made.append({"input_ids": tokens, "labels": [-100] * skip + tokens[skip:]})
    return made


ROWS = {
    "all tokens count": rows_of([9, 4, 12, 5, 7]),
    "completions": rows_of([9, 4, 12, 5, 7], completion=3),
    "a common beginning": rows_of([14, 9, 17, 10, 12], begin=6, completion=2),
    "that counts from its middle on": rows_of([14, 9, 17, 10, 12], begin=6, completion=5),
    "one prompt": rows_of([12, 9, 17], begin=8, completion=1),
}
SHARED = {"a common beginning": 6, "that counts from its middle on": 3, "one prompt": 7}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_are_those_of_every_token_alone(shape, kind, monkeypatch):
    rows, model = ROWS[kind], randomise(adapt(tiny(shape), target_modules=[*ADAPTED[shape], HEAD[shape]])).double()
    batch = collate(rows, pad_id=0)
    assert shared(model, batch) == SHARED.get(kind, 0)
    found = {}
    for p in {shared(model, batch), 0}:
        monkeypatch.setattr(module, "shared", lambda *_, p=p: p)
        model.zero_grad()
        total, count = summed_loss(model, batch)
        total.backward()
        found[p] = [total.detach(), *(c.grad.clone() for c in coefficients(model).values())]
        assert (total.item(), int(count)) == (pytest.approx(slow_loss(model, rows)[0]), slow_loss(model, rows)[1])
    for one, other in zip(found[0], found[max(found)], strict=True):
        assert torch.allclose(one, other, rtol=1e-5)


ADAPTED = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "photonic": ["qkv", "down"]}


def test_the_head_sees_the_positions_that_count_and_is_left_alone():
    model, seen = tiny(), []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    summed_loss(model, collate(ROWS["completions"], 0))
    summed_loss(model, collate(ROWS["a common beginning"], 0))
    handle.remove()
    assert seen == [(15, 37), (0, 37), (10, 37)]
    assert not model.lm_head._forward_pre_hooks


def test_padding_on_the_right_and_no_mask():
    rows = ROWS["a common beginning"]
    model, left = tiny(), collate(rows, 0)
    t = left["input_ids"].shape[1]
    right = {n: torch.full((5, t), -100 if n == "labels" else 0) for n in ("input_ids", "labels", "attention_mask")}
    for i, row in enumerate(rows):
        for name, values in (row | {"attention_mask": [1] * len(row["input_ids"])}).items():
            right[name][i, : len(values)] = torch.tensor(values)
    assert shared(model, right) == 0
    with torch.no_grad():
        assert float(summed_loss(model, right)[0]) == pytest.approx(float(summed_loss(model, left)[0]), rel=1e-5)
        even = collate(rows_of([12, 12], begin=6, completion=2), 0)
        bare_batch = {n: even[n] for n in ("input_ids", "labels")}
        assert shared(model, bare_batch) == 6
        assert float(summed_loss(model, bare_batch)[0]) == pytest.approx(float(summed_loss(model, even)[0]), rel=1e-5)


def test_nothing_is_shared_where_it_does_not_pay_or_each_row_differs():
    model, batch = tiny(), collate(ROWS["a common beginning"], 0)
    assert shared(model, batch) == 6
    assert shared(model, {n: v[:1] for n, v in batch.items()}) == 0  # a row alone
    assert shared(model, collate(rows_of([17] * 4, begin=1, completion=2), 0)) == 0  # 3 tokens of 68
    dropping = adapt(tiny(), amplitude_dropout=0.5)
    assert shared(dropping, batch) == 6  # in eval mode nothing is dropped
    assert shared(dropping.train(), batch) == 0
    assert drops(tiny(attention_dropout=0.1).train()) and not drops(tiny().train())
    window = MistralForCausalLM(
        MistralConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            vocab_size=37,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
        )
    )
    assert not attends_to_all(window) and shared(window, batch) == 0
    with torch.no_grad():
        assert float(summed_loss(window, batch)[0]) > 0


@pytest.mark.parametrize("name", ["positions of its own", "no positions", "token_type_ids"])
def test_other_inputs_are_the_model_s_own_matter(name):
    model, batch = tiny("gpt2"), collate(rows_of([12, 10, 12], begin=6, completion=2), 0)
    assert shared(model, batch) == 6
    if name == "positions of its own":
        batch["position_ids"] = batch["position_ids"].flip(1)
    elif name == "no positions":
        del batch["position_ids"]  # the model counts the padding, too
    else:
        batch[name] = ids(3, 12, seed=4)
    with torch.no_grad():
        total, count = summed_loss(model, batch)
        assert float(total / count) == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_bare_is_the_model_itself():
    model = tiny()
    assert bare(model) is model and bare(adapt(model)) is model
