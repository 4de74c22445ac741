"""Checkpoints that a kill left whole or not, and the best state on the way."""

import math
import os

import pytest
import torch

from ctsft.files import write_text
from ctsft.tune import trainer as training
from ctsft.tune.trainer import (
    COMPLETE,
    KeepBest,
    arranged,
    inventory,
    last_checkpoint,
    read_best,
    restore,
    state_of,
    too_long,
)
from helpers import adapt, randomise, tiny


@pytest.mark.parametrize("damage", ["truncated", "missing", "unmarked"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_damaged_checkpoints_do_not_count(damage, name, tmp_path):
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / name).write_bytes(b"x" * 50)
        write_text(folder / COMPLETE, inventory(folder))
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    if damage == "truncated":
        os.truncate(tmp_path / "checkpoint-10" / name, 20)
    else:
        (tmp_path / "checkpoint-10" / (name if damage == "missing" else COMPLETE)).unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-9"
    assert not (tmp_path / "checkpoint-10").exists()


def test_no_checkpoints(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None


# ---- the order of rows


@pytest.mark.parametrize(("rows", "batch_size", "steps"), [(100, 4, 25), (100, 8, 40), (5, 8, 3), (8, 8, 1), (1, 2, 3)])
def test_every_row_in_each_round(rows, batch_size, steps):
    order = arranged([1] * rows, batch_size, steps, seed=0)
    assert len(order) == steps * batch_size and order == arranged([1] * rows, batch_size, steps, seed=0)
    counts = [order.count(i) for i in range(rows)]
    assert max(counts) - min(counts) <= 1
    assert rows < 5 or order != arranged([1] * rows, batch_size, steps, seed=1)


def test_rows_of_a_batch_are_of_like_length_and_batches_are_not_sorted():
    lengths = torch.randint(10, 100, (800,), generator=torch.Generator().manual_seed(0)).tolist()
    order = arranged(lengths, 8, 100, seed=0)
    assert sorted(order) == list(range(800))
    longest = [max(lengths[i] for i in order[j : j + 8]) for j in range(0, 800, 8)]
    padded, random_order = 8 * sum(longest), [max(lengths[j : j + 8]) for j in range(0, 800, 8)]
    assert padded < 1.15 * sum(lengths) < 0.8 * 8 * sum(random_order)
    assert abs(torch.corrcoef(torch.tensor([longest, range(100)], dtype=torch.float))[0, 1]) < 0.2


def test_an_absurd_number_of_steps_is_no_absurd_list(monkeypatch):
    monkeypatch.setattr(training, "ARRANGED", 50)
    assert len(arranged([1] * 7, 8, 10**9, seed=0)) == 48


# ---- the best state


class State:
    def __init__(self, steps, history=()):
        self.global_step, self.max_steps, self.log_history = 0, steps, [*history]


def trained(path, losses, steps, first=0, history=()):
    """A model that goes through `steps` steps; `losses` by step are what a look at it gives."""
    model, looked = adapt(tiny()), []

    def loss():
        looked.append(state.global_step)
        return losses[state.global_step]

    keep, state = KeepBest(model, loss, path, steps, untold), State(steps, history)
    for step in range(first, steps + 1):
        state.global_step = step
        randomise(model, seed=step, scale=float(step > 0))
        (keep.on_train_begin if step == first else keep.on_step_end)(None, state, None)
    return model, looked


def untold(sentence):
    raise AssertionError(sentence)


def state_after(step):
    return state_of(randomise(adapt(tiny()), seed=step, scale=float(step > 0)))


@pytest.mark.parametrize(
    ("losses", "best"), [({0: 3.0, 8: 2.0, 16: 2.5, 24: 2.0}, 8), ({0: 1.0, 8: 2.0, 16: 1.0, 24: 2.5}, 0)]
)
def test_the_lowest_loss_is_kept_and_the_first_of_equal_ones(losses, best, tmp_path):
    model, looked = trained(tmp_path / "checkpoints" / "best", losses, 32)
    assert looked == [0, 8, 16, 24]  # the last state is measured anyway
    step, loss, state = read_best(tmp_path / "checkpoints" / "best")
    assert (step, loss) == (best, losses[best])
    restore(model, state)
    wanted = state_after(best)
    assert all(torch.equal(c, wanted[n]) for n, c in state_of(model).items())


def test_looks_are_few(tmp_path):
    losses = {step: 1.0 for step in range(1001)}
    assert trained(tmp_path / "a", losses, 7)[1] == [0]
    looked = trained(tmp_path / "b", losses, 1000)[1]
    assert len(looked) == 16 and looked[:3] == [0, 63, 126]


def test_after_a_kill_the_best_state_is_that_of_an_unbroken_run(tmp_path):
    """Killed after step 24 and resumed from step 5: the steps up to there come again."""
    losses = {0: 3.0, 8: 2.0, 16: 2.5, 24: 1.5, 32: 1.5}
    trained(tmp_path / "a", losses, 40)
    trained(tmp_path / "b", losses, 25)
    trained(tmp_path / "b", losses, 40, first=5, history=[{"step": 0, "heldout": 3.0}])
    a, b = read_best(tmp_path / "a"), read_best(tmp_path / "b")
    assert a[:2] == b[:2] == (24, 1.5)
    assert all(torch.equal(c, b[2][n]) for n, c in a[2].items())


def test_a_look_leaves_the_model_training(tmp_path):
    model = adapt(tiny()).train()
    KeepBest(model, lambda: float(model.eval() is None), tmp_path / "best", 8, untold).look(State(8))
    assert model.training


# ---- the way back


def test_a_step_back_is_to_the_best_state_with_a_fresh_optimizer_and_a_slower_schedule(tmp_path):
    """A quarter of the rate at every step that is left, also where the optimizer was saved and loaded in between."""
    model, told = adapt(tiny()), []
    numbers = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(numbers, lr=0.4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    keep, state = KeepBest(model, lambda: 1.0, tmp_path / "best", 10, told.append), State(10)
    keep.look(randomised(state, model, 2))
    for _ in range(2):
        sum(p.square().sum() for p in numbers).backward()
        optimizer.step()
        schedule.step()
    state.global_step = 4
    keep.step_back(state, optimizer, schedule, "not finite")
    wanted = state_after(2)
    assert all(torch.equal(c, wanted[n]) for n, c in state_of(model).items())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.8)
    schedule.load_state_dict(schedule.state_dict())
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.7)
    assert state.log_history[-1] == {"step": 4, "back_to": 2, "why": "not finite", "peak": pytest.approx(0.1)}
    assert told == [
        "After step 4 the loss was not finite, so the run went on from its state of step 2, its lr lowered to 0.1."
    ]


def randomised(state, model, step):
    state.global_step = step
    randomise(model, seed=step, scale=1.0)
    return state


@pytest.mark.parametrize(
    ("after_the_start", "back"),
    [
        ([2.0, 2.0], True),
        ([math.inf, math.nan], True),
        ([2.0], False),
        ([2.0, 0.5, 2.0], False),
        ([0.5, 2.0, 2.0], True),
        ([1.0, 1.0], False),
        (["back", 2.0], False),
        ([2.0, 2.0, "back", 2.0], False),
        ([2.0, 2.0, "back", 2.0, 2.0], True),
    ],
)
def test_two_looks_in_a_row_above_the_start_are_too_long(after_the_start, back):
    history = [{"step": 0, "heldout": 1.0}, {"step": 1, "loss": 9.0}]
    history += [{"back_to": 0} if x == "back" else {"heldout": x} for x in after_the_start]
    assert too_long(history) == back
