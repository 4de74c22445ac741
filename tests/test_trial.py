"""A trial trains one candidate as `ctsft tune` would, and leaves the model as it was."""

import io
import math

import pytest
import torch
from datasets import Dataset

import ctsft
from ctsft.adapter.peers import peer_config
from ctsft.plan import trial as trials
from ctsft.plan.arms import candidate
from ctsft.plan.trial import Bench, Course
from ctsft.tune.recipe import make_recipe
from ctsft.tune.trainer import fit
from helpers import adapt, assert_same_bits, ids, logits, slow_loss, tiny
from tiny import byte_tokenizer

ARMS = ("diagonal-4", "core-3", "gains-4", "scores-2", "diagonal-4@gradient", "lora-1", "lora-4", "vera-5", "norms")
EACH = pytest.mark.parametrize("name", ARMS)


def texts(count=24, seed=3):
    """Rows of 5 to 9 tokens in which every token counts."""
    drawn = ids(count, 9, seed).tolist()
    return [{"input_ids": row[: 5 + i % 5], "labels": row[: 5 + i % 5]} for i, row in enumerate(drawn)]


def bench(shape="llama", dtype=torch.float32, **changes):
    return Bench(tiny(shape, dtype), 0, texts(), texts(6, seed=4), batch_size=4, **changes)


def anatomy(model):
    """All of a model that a trial could leave changed."""
    tensors = {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    modules = {n: (id(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()}
    flags = {n: (id(p), p.requires_grad, p.grad is None) for n, p in model.named_parameters()}
    return tensors, modules, flags, sorted(vars(model)), model.config.to_dict()


@EACH
@pytest.mark.parametrize("shape", ["llama", "gpt2", "photonic"])
def test_every_candidate_starts_at_the_bare_model_and_leaves_it_bit_for_bit(shape, name):
    found = bench(shape)
    bare, before = logits(found.model), anatomy(found.model)
    with found.equipped(candidate(name), seed=1) as equipped:
        assert_same_bits(logits(equipped.model), bare)
        assert equipped.trained == sum(p.numel() for p in equipped.model.parameters() if p.requires_grad) > 0
    done = found.trial(candidate(name), 1, 3, lr=0.05)
    assert done.train[0] != done.train[-1] and done.end != done.heldout[0][1]
    after = anatomy(found.model)
    for tensor, same in zip(after[0].values(), before[0].values(), strict=True):
        assert_same_bits(tensor, same)
    assert after[1:] == before[1:]
    assert_same_bits(logits(found.model), bare)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", ["diagonal-4", "vera-5", "norms"])
def test_the_model_is_bare_again_where_a_trial_breaks_off(name, error):
    found = bench()
    before = anatomy(found.model)

    def stop(n):
        raise error

    with pytest.raises(error):
        found.trial(candidate(name), 0, 3, lr=0.1, tick=stop)
    after = anatomy(found.model)
    assert after[1:] == before[1:] and all(torch.equal(after[0][n], t) for n, t in before[0].items())


def test_it_is_what_tune_does(tmp_path):
    rows, recipe = texts(), make_recipe({"k": 4, "steps": 21, "batch_size": 4, "seed": 2})
    model = adapt(tiny(), basis="random", k=4, seed=2)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token_id = 0
    trainer = fit(model, tokenizer, Dataset.from_list(rows), rows[:4], recipe, 0.2, tmp_path, io.StringIO())
    told = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    done = bench().trial(candidate("diagonal-4"), 2, 21, lr=0.2)
    assert done.train == pytest.approx(told, rel=1e-4) and done.train[-1] < done.train[0] - 0.01


def test_all_candidates_of_a_seed_see_the_same_rows(monkeypatch):
    seen, loss = [], trials.summed_loss
    monkeypatch.setattr(trials, "summed_loss", lambda m, b: (seen.append(b["input_ids"].tolist()), loss(m, b))[1])

    def rows(name, *args, **kwargs):
        seen.clear()
        bench().trial(candidate(name), *args, lr=0.01, looks=(), **kwargs)
        return list(seen)

    first = rows("diagonal-4", 0, 5)
    assert [len(b) for b in first] == [4] * 5 and len(set(map(str, first))) == 5
    assert first == rows("lora-4", 0, 5) == rows("norms", 0, 5) != rows("diagonal-4", 1, 5)
    assert rows("lora-4", 0, 2, horizon=5) == first[:2]
    assert [len(b) for b in rows("lora-4", 0, 3, batch_size=2)] == [2] * 3


def test_a_short_race_is_the_beginning_of_a_long_one():
    found = bench()
    long, short = (found.trial(candidate("diagonal-4"), 0, n, lr=0.2, looks=(2, 4, 6), horizon=6) for n in (6, 4))
    assert short.train == long.train[:4] and short.heldout == long.heldout[:2] and long.heldout[-1][0] == 6
    assert (short.steps, short.horizon, len(short.clock)) == (4, 6, 4)
    assert 0 < short.clock[0] < short.clock[-1] == short.seconds


def test_losses_are_means_over_tokens_and_the_start_is_measured_once(monkeypatch):
    found = bench()
    total, count = slow_loss(tiny(), texts(6, seed=4))
    assert found.start == pytest.approx(total / count, rel=1e-5)
    monkeypatch.setattr(found, "loss", lambda model: 7.0)
    assert found.trial(candidate("norms"), 0, 2, lr=0.01).heldout == [(0, round(found.start, 6)), (2, 7.0)]
    assert found.trial(candidate("norms"), 0, 2, lr=0.01, looks=()).heldout == []


@EACH
def test_the_rate_is_the_rule_on_what_trains(name):
    found, wanted = bench(), candidate(name)
    before = anatomy(found.model)
    lr = found.rate(wanted, seed=5)
    assert 0 < lr < 10 and anatomy(found.model)[1:] == before[1:]
    assert found.trial(wanted, 5, 1, looks=()).rate == lr
    if name == "diagonal-4":
        model = adapt(tiny(), basis="random", k=4, seed=5)
        assert lr == ctsft.learning_rate(model, found.first())


def test_bytes_and_numbers_of_every_kind():
    found = bench()
    numbers = {name: found.trial(candidate(name), 0, 2, lr=0.01, looks=()) for name in ARMS}
    assert numbers["diagonal-4"].trained == 14 * 4 and numbers["norms"].trained == 5 * 16
    shapes = [m.weight.shape for n, m in tiny().named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert numbers["lora-4"].trained == 4 * sum(o + i for o, i in shapes) == 4 * numbers["lora-1"].trained
    assert numbers["vera-5"].trained == sum(5 + o for o, _ in shapes)
    for name, done in numbers.items():
        stored = 4 * 4 * sum(o + i for o, i in shapes) if name.endswith("@gradient") else 0  # directions from data
        assert 0 < done.adapter_bytes - 4 * done.trained - stored < 6000
        frozen = done.memory_bytes - 4 * 4 * done.trained  # beside numbers, gradients and the two averages of Adam
        assert frozen >= 0 and (name in ("lora-1", "lora-4", "norms")) == (frozen < 200), name


def test_small_steps_reach_numbers_of_16_bits():
    found = bench(dtype=torch.bfloat16)
    with found.equipped(candidate("norms")) as equipped:
        course, (gain, *_) = Course(equipped, 1e-4, 40), equipped.trainable
        assert gain.dtype == torch.bfloat16 and course.masters[0].dtype == torch.float32
        for _ in range(40):
            course.step(found.batch(range(4)))
        assert 5e-4 < (course.masters[0] - 1).abs().max() < 4e-3  # each step alone would be rounded away
        assert course.memory_bytes > (2 + 4 + 8) * equipped.trained
    assert (gain == 1).all() and not gain.requires_grad


def test_a_trial_that_diverges_ends_and_says_so():
    found = bench()
    done = found.trial(candidate("norms"), 0, 6, lr=1e30, looks=(0, 1, 6))
    assert done.diverged and done.end == math.inf and done.train[-1] is None and len(done.train) < 6
    assert done.adapter_bytes > 0 and found.trial(candidate("norms"), 0, 1, lr=0.01).end < math.inf


def test_scores_are_asked_of_the_trained_model_where_they_are_wanted():
    asked = []
    found = bench(score=lambda model: asked.append(logits(model)))
    found.trial(candidate("lora-4"), 0, 2, lr=0.1)
    assert not asked
    found.trial(candidate("lora-4"), 0, 2, lr=0.1, scored=True)
    assert len(asked) == 1 and not torch.equal(asked[0], logits(found.model))


def test_few_rows_are_enough_for_a_rate():
    one = Bench(tiny(), 0, texts(1), texts(2), batch_size=4)
    assert len(one.first()) == 2 and one.rate(candidate("diagonal-4")) > 0
    assert one.trial(candidate("diagonal-4"), 0, 2).batch_size == 4


def test_peers_are_at_scale_one():
    config = peer_config(tiny(), "lora", 8, 0, ["model.layers.0.mlp.up_proj"])
    assert config.lora_alpha == config.r == 8
