"""All probes on a run: not felt by training, and right."""

import json
import math
import time

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from ctsft import CTError
from ctsft.adapter.resize import resize
from ctsft.probe import DENSE, ProbeCallback, Probes
from ctsft.quantities.ablation import ablation
from ctsft.quantities.gradients import coverage, gradient_snr
from ctsft.quantities.look import look
from ctsft.spectral.decompose import effective_rank, stable_rank
from helpers import SHAPES, adapt, assert_same_bits, backward, coefficients, ids, owners, randomise, rows, tiny, whole

ALL = ("coverage", "gradient_rank", "gradient_snr", "diversity")


# ---- all of them on a run


def train(model, probes=None, steps=7, change=None):
    """A run on a fixed batch, with dropout of amplitudes; returns its losses."""
    torch.manual_seed(3)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for update in range(1, steps + 1):
        if change and update == 4:
            resize(model, change, optimizer=optimizer)
        model.train()
        losses.append(backward(model, rows()))
        if probes:
            probes.before_step(model, update)
        optimizer.step()
        if probes:
            probes.after_step(model, update)
    return losses


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_with_all_probes_is_the_run_without(shape):
    runs = []
    for probes in (None, Probes(ALL, 2, [rows(seed=4)])):
        model = whole(shape, amplitude_dropout=0.3)
        losses = train(model, probes)
        runs.append((losses, coefficients(model), torch.get_rng_state()))
    (losses, plain, state), (same_losses, probed, same_state) = runs
    assert losses == same_losses and len(set(losses)) == 7
    assert_same_bits(state, same_state)
    for name, c in plain.items():
        assert_same_bits(c, probed[name])


def test_nothing_of_the_model_is_touched():
    model = whole(amplitude_dropout=0.3)
    model.train()
    model.base_model.model.model.layers[0].eval()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    backward(model, rows())

    def state():
        parameters = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return parameters, grads, [m.training for m in model.modules()], hooks, torch.get_rng_state()

    before = state()
    probes = Probes(ALL, 1, [rows(seed=4)])
    probes.before_step(model, 1)
    probes.after_step(model, 1)
    ablation(model, lambda: torch.rand(1).item(), [1])  # what a loss draws is given back
    after = state()
    with pytest.raises(IndexError):  # an id that the model does not know, in the middle of a pass
        look(model, [rows(), {"input_ids": ids() + 1000}])
    for found in (after, state()):
        for (a, flag), (b, same) in zip(before[0].values(), found[0].values(), strict=True):
            assert_same_bits(a, b)
            assert flag == same
        for a, b in zip(before[1].values(), found[1].values(), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert before[2:4] == found[2:4]
        assert_same_bits(before[4], found[4])


def test_the_series_of_a_run():
    def fresh():
        return randomise(adapt(tiny(hidden_size=32), k=24, target_modules=["up_proj", "embed_tokens"]), scale=0.1)

    model, start, batch = fresh(), fresh(), rows()
    probes = Probes(ALL, 3, [batch])
    train(model, probes)
    series = probes.series
    json.dumps(series)
    cheap = {"gradient_norm", "amplitude_rms", "amplitude_max", "diversity", "constrained_effective_rank"}
    for name in cheap | {"abs_mean_over_std_top", "abs_mean_over_std_rest"}:
        assert [u for u, _ in series[name]] == [1, 2, 3, 4, 5, 6, 7]
    for name in ("cosine", "abs_mean_over_std_by_number_top", "abs_mean_over_std_by_number_rest"):
        assert [u for u, _ in series.pop(name)] == [2, 3, 4, 5, 6, 7]
    heavy = {"true_effective_rank", "true_stable_rank", "true_effective_rank_by_matrix"}
    heavy |= {f"coverage_{kind}" for kind in ("diagonal", "diagonal_null", "two_sided", "input", "output")}
    heavy |= {"gradient_snr", "snr_top", "snr_rest"}
    for name in heavy:
        assert [u for u, _ in series[name]] == [1, 3, 6]
    assert set(series) == cheap | heavy | {"abs_mean_over_std_top", "abs_mean_over_std_rest"}

    backward(start, batch)  # the first value of each, by its own definition
    grads = torch.cat([c.grad.flatten() for c in coefficients(start).values()]).double()
    seen = look(start, [batch])
    first = {name: values[0][1] for name, values in series.items()}
    assert first["gradient_norm"] == pytest.approx(float(grads.norm()), rel=1e-5)
    assert first["gradient_snr"] == pytest.approx(gradient_snr(seen.samples))
    assert first["snr_rest"] == first["gradient_snr"]["rest"] != first["snr_top"]
    ranks = {n: effective_rank(torch.linalg.svdvals(g.double())) for n, g in seen.gradients.items()}
    assert first["true_effective_rank_by_matrix"] == pytest.approx(ranks)
    assert first["true_effective_rank"] == pytest.approx(np.mean(list(ranks.values())))
    stable = [stable_rank(torch.linalg.svdvals(g.double())) for g in seen.gradients.values()]
    assert first["true_stable_rank"] == pytest.approx(np.mean(stable))
    assert list(ranks) == ["model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    for kind in ("diagonal", "two_sided", "input", "output", "diagonal_null"):
        shares = [coverage(seen.gradients[n], m.ready("default"))[kind][-1] for n, m in owners(start).items()]
        assert first[f"coverage_{kind}"] == pytest.approx(float(sum(shares)) / 3)
    numbers = torch.cat([c.detach().flatten() for c in coefficients(model).values()]).double()
    assert series["amplitude_rms"][-1][1] == pytest.approx(float((numbers**2).mean().sqrt()))
    assert series["amplitude_max"][-1][1] == pytest.approx(float(numbers.abs().max()))


def test_what_probes_cost_is_counted():
    probes, started = Probes(ALL, 3, [rows()], samples=[rows(seed=5)]), time.perf_counter()
    train(whole(), probes)
    groups = {"every step", "diversity", "gradient_rank", "gradient_snr", "pass", "pass of samples", "coverage"}
    assert set(probes.seconds) == groups and all(s > 0 for s in probes.seconds.values())
    assert sum(probes.seconds.values()) < time.perf_counter() - started


def test_samples_of_their_own():
    model, samples = whole(), [rows(3, 5, seed=6), rows(4, 5, seed=7)]
    probes = Probes(["gradient_snr"], 1, [rows()], samples)
    probes.measure(model, 0)
    assert probes.series["gradient_snr"] == [[0, gradient_snr(look(model, samples, gradients=False).samples)]]


def test_diversity_of_a_long_run_is_read_with_the_heavy_probes():
    model, probes = whole(), Probes(["diversity"], 60)
    backward(model, rows())
    for update in range(1, DENSE + 21):
        probes.before_step(model, update)
    assert [u for u, _ in probes.series["diversity"]] == [*range(1, DENSE + 1), 120]


def test_k_may_change_during_the_run():
    model, probes = whole(k=3), Probes(ALL, 2, [rows()])
    train(model, probes, change=6)
    assert len(probes.series["cosine"]) == 6 and len(probes.series["diversity"]) == 7
    ranks = [v for _, v in probes.series["constrained_effective_rank"]]
    assert max(ranks[:3]) <= 3 < ranks[-1] <= 6


def test_a_run_that_diverged_gives_no_numbers_but_goes_on():
    model, probes = whole(), Probes(ALL, 1, [rows()])
    backward(model, rows())
    for c in coefficients(model).values():
        c.grad.fill_(math.nan)
        c.data.fill_(math.nan)
    probes.before_step(model, 1)
    probes.after_step(model, 1)
    for name in ("gradient_norm", "diversity", "true_effective_rank", "coverage_diagonal", "snr_top", "amplitude_rms"):
        assert math.isnan(probes.series[name][0][1])


def test_norms_and_cosines_on_any_model():
    for model in (tiny(), get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))):
        probes = Probes()
        train(model, probes, steps=3)
        assert set(probes.series) == {"gradient_norm", "cosine", "amplitude_rms", "amplitude_max"}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        text = ids(12, 8)[i]
        return {"input_ids": text, "labels": text}


def trainer(folder, model, *callbacks):
    transformers_logging.set_verbosity_error()
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, settings, train_dataset=Rows(), callbacks=list(callbacks))


def test_a_trainer_with_probes_is_the_trainer_without(tmp_path):
    plain, probed = whole(amplitude_dropout=0.3), whole(amplitude_dropout=0.3)
    probes = Probes(ALL, 2, [rows()])
    trainer(tmp_path, plain).train()
    run = trainer(tmp_path, probed, ProbeCallback(probes))
    run.train()
    for name, c in coefficients(plain).items():
        assert_same_bits(coefficients(probed)[name], c)
    logged = [[e["step"], pytest.approx(e["grad_norm"], rel=1e-5)] for e in run.state.log_history if "grad_norm" in e]
    assert probes.series["gradient_norm"] == logged and len(logged) == 5
    assert [u for u, _ in probes.series["amplitude_rms"]] == [1, 2, 3, 4, 5]
    assert [u for u, _ in probes.series["snr_top"]] == [1, 2, 4]
    numbers = torch.cat([c.detach().flatten() for c in coefficients(probed).values()])
    assert probes.series["amplitude_max"][-1][1] == pytest.approx(float(numbers.abs().max()))


# ---- mistakes


@pytest.mark.parametrize(
    "arguments, message",
    (
        ((["speed"],), "there are no probes speed; there are coverage, gradient_rank, gradient_snr, diversity."),
        (([], 0), "every=0 must be at least 1 update."),
        ((["coverage"],), "coverage and gradient_rank need batches of their own; give at least one."),
        ((["gradient_snr"], 1, [rows(3)]), "gradient_snr has 3 samples; with fewer than 4 the ratio"),
        ((["gradient_snr"], 1, [rows(8)], [rows(2)]), "gradient_snr has 2 samples;"),
    ),
)
def test_mistakes_in_the_choice_of_probes(arguments, message):
    with pytest.raises(CTError) as caught:
        Probes(*arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("form", ["core", "scores"])
def test_snr_of_numbers_that_are_no_amplitudes(form):
    model = whole(form=form)
    backward(model, rows())
    with pytest.raises(CTError, match="gradient_snr reads the gradients of amplitudes, so it needs form='diagonal'"):
        Probes(["gradient_snr"], 100, [rows()]).before_step(model, 2)


def test_a_model_in_which_nothing_trains():
    with pytest.raises(CTError, match="nothing in the model trains"):
        Probes().before_step(tiny().requires_grad_(False), 1)
