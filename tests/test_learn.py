"""Joint learning of directions on siblings, against dense dW by autograd."""

import math
from copy import deepcopy

import pytest
import torch
from torch.func import functional_call

from ctsft import CTConfig, CTError, learn_basis
from ctsft.adapter import learn as learning
from ctsft.adapter.learn import FEWEST, Joint, joined, ladder, turns
from ctsft.adapter.learned import Learned
from ctsft.adapter.loss import shared
from ctsft.spectral.weights import matrix
from helpers import BLOCKS, EMBEDDING, HEAD, SHAPES, adapt, assert_close, assert_same_bits, ids, logits, owners, tiny

MIXED = {"[kv]_proj": 8, ".*": 16}


def texts(count=4, seed=0, length=8):
    return [{"input_ids": ids(1, length, seed=100 * seed + i)} for i in range(count)]


def family(siblings=3, **options):
    return {f"s{i}": texts(seed=i, **options) for i in range(siblings)}


def learn(model=None, siblings=None, **options):
    return learn_basis(model or tiny(), siblings or family(), **{"k": 8, "steps": 6} | options)


def parts_of(learned):
    return {"u": learned.u, "vh": learned.vh, "siblings": learned.siblings}


def assert_same(a, b):
    for one, other in zip(parts_of(a).values(), parts_of(b).values(), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert_same_bits(one[name], other[name])


# ---- the joint step


@pytest.mark.parametrize("first", [None, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_those_of_dense_weights(shape, tied, first):
    """Every row through a model with the dense dW of its own sibling, one at a time."""
    base = tiny(shape)
    modules = [*BLOCKS[shape], *([EMBEDDING[shape]] if tied else [])]
    joint = Joint(base, CTConfig(k=6, basis="random", target_modules=modules), 3, seed=0)
    assert bool(joint.owners) == tied
    for a in joint.a.values():
        a.data = 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    batch = [(2, {"input_ids": ids(2, 8)}), (0, {"input_ids": ids(1, 5, seed=4)})]
    with joint.beside():
        loss = joint.loss(batch, first)
        loss.backward()
    found = {(n, p): getattr(joint, p)[n].grad.clone() for n in joint.u for p in ("u", "vh", "a")}
    total, count = torch.zeros(()), 0
    for p in (p for part in (joint.u, joint.vh, joint.a) for p in part.values()):
        p.grad = None
    for index, one in batch:
        for row in one["input_ids"]:
            weights = {}
            for name in joint.u:
                k = first or 6
                dw = (joint.u[name][:, :k] * joint.a[name][index, :k]) @ joint.vh[name][:k]
                module = base.get_submodule(name)
                layout = dw if matrix(module) is module.weight or module.weight.shape == dw.shape else dw.T
                if shape == "gpt2" and type(module).__name__ == "Conv1D":
                    layout = dw.T
                weights[f"{name}.weight"] = module.weight.detach() + layout
                if name in joint.owners.values():
                    (use,) = [use for use, of in joint.owners.items() if of == name]
                    weights[f"{use}.weight"] = weights[f"{name}.weight"]
            out = functional_call(base, weights, (), {"input_ids": row[None], "labels": row[None]})
            total, count = total + out.loss * (len(row) - 1), count + len(row) - 1
    (total / count).backward()
    assert_close(loss, total / count, 1e-5)
    for name, part in found:
        assert_close(found[name, part], getattr(joint, part)[name].grad, 1e-4)
    assert HEAD[shape] in joint.owners or not tied


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_begin_alike_give_the_same_loss_and_gradients(tied, monkeypatch):
    modules = [*BLOCKS["llama"], *([EMBEDDING["llama"]] if tied else [])]
    joint = Joint(tiny(), CTConfig(k=6, basis="random", target_modules=modules), 3, seed=0)
    for a in joint.a.values():
        a.data = 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    parts = []
    for index in (2, 0):
        batch = {"input_ids": torch.cat([ids(1, 6, seed=index).expand(4, 6), ids(4, 5, seed=9)], 1)}
        batch["labels"] = torch.cat([torch.full((4, 8), -100), batch["input_ids"][:, 8:]], 1)
        assert shared(joint.model, batch) == 6
        parts.append((index, batch))
    found = []
    for way in (shared, lambda *_: 0):
        monkeypatch.setattr(learning, "shared", way)
        with joint.beside():
            loss = joint.loss(parts, 4)
            loss.backward()
        numbers = [p for part in (joint.u, joint.vh, joint.a) for p in part.values()]
        found.append([loss.detach(), *(p.grad for p in numbers)])
        for p in numbers:
            p.grad = None
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-5)


def test_the_start_is_the_base_to_the_bit_and_the_model_is_left_as_it_was():
    model = tiny().train()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].eval()
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    joint = Joint(model, CTConfig(k=4, basis="random"), 2, seed=0)
    plain = logits(deepcopy(model).eval())
    with joint.beside():
        joint.loss([(1, {"input_ids": ids()})])
        assert_same_bits(logits(model), plain)
    learn(model)
    assert (
        model.training and not model.model.layers[0].mlp.training and not any(m._forward_hooks for m in model.modules())
    )
    for name, p in model.named_parameters():
        assert_same_bits(p.detach(), before[name][0])
        assert p.requires_grad == before[name][1] and p.grad is None


def test_batches_are_padded_on_the_right_and_labels_kept():
    labels = torch.tensor([[-100, -100, 5]])
    batch, rows = joined([(1, {"input_ids": ids(2, 5)}), (0, {"input_ids": ids(1, 3), "labels": labels})])
    assert batch["input_ids"].shape == (3, 5) and rows.tolist() == [1, 1, 0]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"][2].tolist() == [-100, -100, 5, -100, -100]
    assert_same_bits(batch["labels"][:2], ids(2, 5))


# ---- learning


def test_siblings_lose_loss_and_directions_are_of_unit_length():
    siblings = family()
    learned = learn(siblings=siblings, steps=60, rates=(0.02, 0.05), heldout=siblings)
    for one in learned.facts.siblings:
        assert one.after < one.before - 0.1 and one.tokens > 0
    for name in learned.u:
        assert learned.u[name].shape[1] == learned.vh[name].shape[0] == learned.siblings[name].shape[1] == 8
        assert_close(learned.u[name].norm(dim=0), torch.ones(8), 1e-6)
        assert_close(learned.vh[name].norm(dim=1), torch.ones(8), 1e-6)
        assert learned.siblings[name].abs().max() > 0


def test_what_was_learned_is_what_the_siblings_saw(tmp_path):
    """Each sibling's dW, put together again from the file, gives the loss that was noted."""
    siblings = family()
    learned = learn(siblings=siblings, steps=12, heldout=siblings, nested=False)
    learned.save(tmp_path)
    for index, one in enumerate(learned.facts.siblings):
        model = adapt(tiny(), k=8, basis="learned", basis_file=str(tmp_path))
        for name, layer in owners(model).items():
            layer.ctsft_coefficients["default"].data = learned.siblings[name][index].clone()
        with torch.no_grad():
            losses = [model(**batch, labels=batch["input_ids"]).loss.item() for batch in siblings[one.name]]
        assert math.isclose(sum(losses) / len(losses), one.after, rel_tol=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    assert_same(learn(), learn())
    a, b = learn(), learn(seed=1)
    assert not any(torch.equal(a.u[n], b.u[n]) for n in a.u)


def test_a_step_counts_on_the_first_of_the_directions(monkeypatch):
    seen, loss = [], Joint.loss
    monkeypatch.setattr(Joint, "loss", lambda self, parts, first=None: seen.append(first) or loss(self, parts, first))
    learn(k=MIXED, steps=40, nested=True)
    assert set(seen) == {16, 8, 4} == set(ladder(16))
    seen.clear()
    learn()
    assert set(seen) == {8}


def test_the_ladder_ends_where_few_directions_are_left():
    assert ladder(64) == [64, 32, 16, 8, 4] and ladder(20) == [20, 10, 5] and ladder(3) == [3] and FEWEST == 4


def test_those_that_siblings_use_most_come_first_among_those_of_a_size():
    learned = learn(k=MIXED, steps=30, nested=True)
    for a in learned.siblings.values():
        power = a.square().sum(0)
        for low, high in ((0, 4), (4, 8), (8, 16)):
            assert (power[low : high - 1] >= power[low + 1 : high]).all()


def test_all_siblings_have_their_turn_in_every_round():
    drawn = turns({name: [name] for name in "abc"}, 2, seed=0, done=0)
    found = [next(drawn) for _ in range(6)]
    order = [index for step in found for index, _ in step]
    assert all(sorted(order[i : i + 3]) == [0, 1, 2] for i in (0, 3, 6, 9))
    assert all("abc"[index] == batch for step in found for index, batch in step)
    later = turns({name: [name] for name in "abc"}, 2, seed=0, done=2)
    assert [next(later) for _ in range(4)] == found[2:]


def test_k_can_differ_by_module():
    learned = learn(k={"q_proj": 2, ".*": 8})
    assert {a.shape[1] for n, a in learned.siblings.items() if n.endswith("q_proj")} == {2}
    assert {a.shape[1] for n, a in learned.siblings.items() if not n.endswith("q_proj")} == {8}


# ---- the file, and going on


def test_it_is_saved_and_read_to_the_same_bits(tmp_path):
    learned = learn()
    path = learned.save(tmp_path)
    for place in (path, tmp_path, str(tmp_path)):
        again = Learned.read(place)
        assert_same(learned, again)
        assert again.facts == learned.facts
    with pytest.raises(CTError, match="holds no learned directions"):
        Learned.read(tmp_path / "other")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_learning_goes_on_to_the_same_bits(after, tmp_path, monkeypatch):
    monkeypatch.setattr("ctsft.adapter.learn.SAVE_EVERY", -1.0)
    held = family()
    whole = learn(heldout=held)
    loss, calls = Joint.loss, []

    def dies(self, parts, first=None):
        calls.append(1)
        if len(calls) > 12 + after:  # 12 batches are scored before
            raise Killed
        return loss(self, parts, first)

    monkeypatch.setattr(Joint, "loss", dies)
    with pytest.raises(Killed):
        learn(heldout=held, keep=tmp_path / "state")
    monkeypatch.setattr(Joint, "loss", loss)
    again = learn(heldout=held, keep=tmp_path / "state")
    assert_same(whole, again)
    assert again.facts.siblings == whole.facts.siblings


def test_a_state_that_is_not_ours_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ctsft.adapter.learn.SAVE_EVERY", -1.0)
    path = tmp_path / "state"
    learn(keep=path)
    for other in ({"seed": 1}, {"k": 4}, {"steps": 7}, {"siblings": family(2)}, {"model": tiny(seed=1)}):
        with pytest.raises(CTError, match="was left by a learning from other siblings, weights or options; delete it"):
            learn(keep=path, **other)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    for damaged in (bytes(data), bytes(data[:50]), b""):
        path.write_bytes(damaged)
        with pytest.raises(CTError, match="state is damaged; delete it to learn from the start"):
            learn(keep=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"siblings": {"a": []}}, "sibling 'a' has no batches left"),
        ({"siblings": {"a": iter(texts(2))}, "batches": 1}, "sibling 'a' has no batches left"),
        ({"steps": 0}, "there is nothing to learn from"),
        ({"k": 17}, "k=17 is more than the"),
        ({"target_modules": ["x"]}, "match nothing in LlamaForCausalLM"),
        ({"rates": (1e30, 1e30)}, "the loss is (nan|inf) at step"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(CTError, match=message):
        learn(**options)
    with pytest.raises(CTError, match="there is nothing to learn from"):
        learn_basis(tiny(), {})
