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
from ctsft.probe import (
    DENSE,
    TOP,
    AbsMeanOverStd,
    Diversity,
    ProbeCallback,
    Probes,
    Vector,
    ablation,
    amplitude_gradients,
    constrained_effective_rank,
    cosine,
    coverage,
    gradient_snr,
    gradient_vector,
    gram_singular_values,
    look,
)
from ctsft.spectral.basis import Basis, gradient_basis, random_basis
from ctsft.spectral.decompose import effective_rank, stable_rank
from ctsft.spectral.weights import matrix
from helpers import (
    EMBEDDING,
    FORMS,
    SHAPES,
    adapt,
    assert_close,
    assert_same_bits,
    coefficients,
    ids,
    owners,
    randomise,
    tiny,
    twin,
)

ALL = ("coverage", "gradient_rank", "gradient_snr", "diversity")
BLOCKS = {
    "llama": ["q_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "photonic": ["qkv", "proj", "up", "down"],
}


def whole(shape="llama", k=6, **options):
    """A tiny model with its block matrices and its tied embedding adapted, as if trained for a while."""
    return randomise(adapt(tiny(shape), k=k, target_modules=[*BLOCKS[shape], EMBEDDING[shape]], **options), scale=0.1)


def rows(count=5, length=8, seed=1):
    text = ids(count, length, seed)
    return {"input_ids": text, "labels": text}


def ragged():
    """Two batches of different sizes, whose rows have different numbers of labels."""
    text, labels = ids(3, 8, seed=2), ids(3, 8, seed=2)
    labels[0, :5], labels[2, 6:] = -100, -100
    return [{"input_ids": text, "labels": labels}, rows(2, 6, seed=3)]


def backward(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item()


def vector(*pieces):
    pieces = [torch.as_tensor(p, dtype=torch.float32) for p in pieces]
    return Vector(torch.cat([p.flatten() for p in pieces]), tuple(p.shape for p in pieces))


# ---- gradients of the trained numbers


def test_cosine_is_that_of_the_joined_vectors():
    a, b = ([torch.randn(4), torch.randn(3, 3)] for _ in range(2))
    flat = [torch.cat([p.flatten() for p in side]).double().numpy() for side in (a, b)]
    expected = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert cosine(vector(*a), vector(*b)) == pytest.approx(expected, rel=1e-6)
    assert cosine(vector(*a), vector(*(-p for p in a))) == pytest.approx(-1)
    assert math.isnan(cosine(vector(*a), vector(*(0 * p for p in a))))


def test_between_two_k_only_common_directions_count():
    small, large = vector([3.0, 0.0], [[1.0]]), vector([1.0, 5.0, 2.0], [[2.0, 7.0], [7.0, 7.0]])
    padded = vector([3.0, 0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    assert cosine(small, large) == pytest.approx(cosine(padded, large))
    assert cosine(large, small) == pytest.approx(cosine(small, large))
    assert cosine(small, large) == pytest.approx(5 / math.sqrt(10) / math.sqrt(30 + 4 + 3 * 49))


def test_the_same_batch_at_the_same_place_gives_cosine_one():
    model = whole()
    backward(model, rows())
    first = gradient_vector(model)
    backward(model, rows())
    assert cosine(first, gradient_vector(model)) == pytest.approx(1, abs=1e-6)
    backward(model, rows(seed=9))
    assert cosine(first, gradient_vector(model)) < 0.99


def test_diversity_is_the_effective_rank_of_the_dense_stack():
    diversity, stack = Diversity(), []
    for i in range(7):
        g = torch.randn(12) * 10.0 ** (i - 3)  # lengths do not count
        diversity.add(vector(g[:5], g[5:]))
        stack.append((g / g.norm()).double())
        assert diversity.value() == pytest.approx(effective_rank(torch.linalg.svdvals(torch.stack(stack))), rel=1e-6)


def test_diversity_from_one_to_the_number_of_gradients():
    same, other = Diversity(), Diversity()
    for row in torch.eye(4):
        same.add(vector([1.0, 2.0, 3.0]))
        other.add(vector(row))
    assert same.value() == pytest.approx(1, abs=1e-4)
    assert other.value() == pytest.approx(4)
    same.add(vector([0.0, 0.0, 0.0]))
    assert same.value() == pytest.approx(1, abs=1e-4)
    same.add(vector([math.nan, 0.0, 0.0]))
    assert math.isnan(same.value())


def test_diversity_when_k_grows():
    grown, padded = Diversity(), Diversity()
    for g in ([1.0, 2.0], [0.0, 1.0, 3.0], [1.0, 1.0]):
        grown.add(vector(g))
        padded.add(vector(g + [0.0] * (3 - len(g))))
    assert grown.value() == pytest.approx(padded.value())


@pytest.mark.parametrize("form", FORMS)
def test_the_constrained_gradient_has_the_rank_of_its_dense_form(form):
    model = whole(form=form)
    backward(model, rows())
    ranks = []
    for layer in owners(model).values():
        basis, g = layer.ready("default"), layer.ctsft_coefficients["default"].grad
        dense = g @ basis.vh if basis.u is None else basis.u @ (torch.diag(g) if g.ndim == 1 else g) @ basis.vh
        ranks.append(effective_rank(torch.linalg.svdvals(dense.double())))
    found = constrained_effective_rank(amplitude_gradients(model))
    assert found == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)
    assert 1 < found <= 6


def test_mean_over_std_is_numpys():
    ratios, seen = AbsMeanOverStd(), {"a": [], "b": []}
    for _ in range(5):
        gradients = {n: torch.randn(TOP + 3) + i for i, n in enumerate(seen)}
        ratios.add(gradients)
        for n, g in gradients.items():
            seen[n].append(g.double().numpy())
    stack = np.stack([np.array(s) for s in seen.values()])  # matrices, steps, directions
    found = ratios.values()
    for group, part in {"top": stack[..., :TOP], "rest": stack[..., TOP:]}.items():
        assert found[f"abs_mean_over_std_{group}"] == pytest.approx(np.abs(part).mean() / part.std())
        by_number = np.abs(part).mean(1) / part.std(1)
        assert found[f"abs_mean_over_std_by_number_{group}"] == pytest.approx(by_number.mean())


def test_mean_over_std_when_k_grows():
    ratios = AbsMeanOverStd()
    ratios.add({"a": torch.tensor([1.0, 2.0])})
    assert set(ratios.values()) == {"abs_mean_over_std_top"}  # one update has no spread over updates
    ratios.add({"a": torch.tensor([3.0, 3.0, -1.0])})
    every = np.array([1, 2, 3, 3, -1.0])
    found = ratios.values()
    assert found["abs_mean_over_std_top"] == pytest.approx(np.abs(every).mean() / every.std())
    assert found["abs_mean_over_std_by_number_top"] == pytest.approx((2 / 1 + 2.5 / 0.5) / 2)


# ---- the true gradient


@pytest.mark.parametrize("shape", ((9, 9), (12, 5), (5, 12)))
def test_coverage_is_the_dense_algebra_for_every_k(shape):
    g, basis = torch.randn(shape), random_basis(shape, 5, 0, "x")
    found = coverage(g, basis)
    dense, total = g.double(), g.double().square().sum()
    for k in range(1, 6):
        u, v = basis.u[:, :k].double(), basis.vh[:k].double().T
        expected = {
            "diagonal": sum(float(u[:, i] @ dense @ v[:, i]) ** 2 for i in range(k)),
            "two_sided": (u @ u.T @ dense @ v @ v.T).square().sum(),  # projectors on both sides
            "input": (dense @ v @ v.T).square().sum(),
            "output": (u @ u.T @ dense).square().sum(),
            "diagonal_null": total * k / dense.numel(),
        }
        assert {n: float(s[k - 1]) for n, s in found.items()} == pytest.approx(
            {n: float(e / total) for n, e in expected.items()}, rel=1e-5
        )
        assert found["diagonal"][k - 1] <= found["two_sided"][k - 1] + 1e-6
        assert found["two_sided"][k - 1] <= min(found["input"][k - 1], found["output"][k - 1]) + 1e-6


def test_coverage_of_a_full_basis_is_one():
    g = torch.randn(7, 7)
    full = coverage(g, random_basis((7, 7), 7, 0, "x"))
    for kind in ("two_sided", "input", "output"):
        assert float(full[kind][-1]) == pytest.approx(1, rel=1e-5)
    assert full["diagonal"][-1] < 0.9  # K amplitudes are not K x K
    own = coverage(torch.randn(12, 7), gradient_basis(torch.randn(12, 7), 7))
    assert float(own["input"][-1]) == pytest.approx(1, rel=1e-5)
    g = torch.randn(12, 7)
    assert float(coverage(g, gradient_basis(g, 7))["diagonal"][-1]) == pytest.approx(1, rel=1e-5)


def test_directions_that_do_not_know_the_gradient_cover_the_null():
    g = torch.randn(3, 12).T @ torch.randn(3, 10)
    found = [coverage(g, random_basis((12, 10), 8, seed, "x")) for seed in range(600)]
    mean = torch.stack([f["diagonal"] for f in found]).mean(0)
    assert_close(mean, found[0]["diagonal_null"], 0.12)


def test_coverage_of_one_side():
    basis = random_basis((6, 8), 3, 0, "x")
    assert set(coverage(torch.randn(6, 8), Basis(None, basis.vh))) == {"input"}
    assert set(coverage(torch.randn(6, 8), Basis(basis.u, None))) == {"output"}


@pytest.mark.parametrize("shape", ((30, 7), (7, 30)))
def test_singular_values_by_the_smaller_side(shape):
    g = torch.randn(shape)
    assert_close(gram_singular_values(g).flip(0), torch.linalg.svdvals(g.double()), 1e-10)
    g[0, 0] = math.inf
    assert gram_singular_values(g).isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_true_gradient_is_that_of_a_dense_model(shape):
    model = whole(shape)
    dense = twin(model, tiny(shape))
    found = look(model, ragged()).gradients
    expected = {n: 0 for n in owners(model)}
    for batch in ragged():
        backward(dense, batch)
        for name in expected:
            module = dense.get_submodule(name)
            expected[name] = expected[name] + matrix(module, module.weight.grad).clone() / 2
    assert list(found) == list(expected) and EMBEDDING[shape] in str(list(found))
    for name, g in found.items():
        assert_close(g, expected[name], 1e-4)


@pytest.mark.parametrize("dense", (True, False))
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_samples_are_those_of_a_loop(shape, dense):
    model, batches = whole(shape), ragged()
    owners(model)[
        next(n for n in owners(model) if n.endswith(EMBEDDING[shape]))
    ].base_layer.embed_scale = 3.0  # Gemma's
    found = look(model, batches, gradients=dense).samples
    expected = {n: [] for n in owners(model)}
    for batch in batches:
        counts = (batch["labels"][:, 1:] != -100).sum(1)
        for row in range(len(counts)):
            alone = {k: v[row : row + 1] for k, v in batch.items()}  # its own mean loss, then its share of the batch's
            share = float(counts[row] / counts.sum()) * len(counts)
            backward(model, alone)
            for name, c in coefficients(model).items():
                expected[name].append(c.grad.clone() * share)
    for name, g in found.items():
        assert g.shape == (5, 6)
        assert_close(g, torch.stack(expected[name]), 1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_mean_of_the_samples_is_the_gradient_of_the_batch(dtype):
    model = whole(basis="random").to(dtype)
    backward(model, rows())
    for name, g in look(model, [rows()], gradients=False).samples.items():
        assert_close(g.mean(0), coefficients(model)[name].grad, 1e-5 if dtype == torch.float32 else 0.1)


def test_snr_is_the_loop_over_directions():
    samples = {n: torch.randn(6, TOP + 4) + 0.5 for n in "ab"}
    samples["a"][:, 0] = 0  # a direction without any gradient has no signal
    top, rest = [], []
    for g in samples.values():
        for i, column in enumerate(g.T.double().numpy()):
            mean, variance = column.mean(), column.var(ddof=1)
            (top if i < TOP else rest).append(mean**2 / variance if variance else 0.0)
    assert gradient_snr(samples) == pytest.approx({"top": np.mean(top), "rest": np.mean(rest)}, rel=1e-6)
    assert set(gradient_snr({"a": torch.randn(6, TOP)})) == {"top"}


def test_snr_of_pure_noise():
    n = 8
    noise = gradient_snr({"a": torch.randn(n, 40_000)})
    assert noise["rest"] == pytest.approx((n - 1) / (n * (n - 3)), rel=0.05)


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


def test_mistakes_that_only_the_model_shows():
    replacing = adapt(tiny(), basis="universal", form="scores", universal_mode="replace")
    for model, wrong in (
        (tiny(), "the model has no CT-SFT adapter 'default'"),
        (whole(form="core"), "gradient_snr reads the gradients of amplitudes, so it needs form='diagonal'."),
        (replacing, "universal_mode='replace' takes W out of the model"),
        (adapt(tiny("gpt2"), target_modules=["wpe"]), "transformer.wpe sees 1 rows of a batch of 5"),
    ):
        with pytest.raises(CTError, match=wrong):
            look(model, [rows()])
        assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(CTError, match="needs batches of its own"):
        look(whole(), [])
    with pytest.raises(CTError, match="nothing in the model trains"):
        Probes().before_step(tiny().requires_grad_(False), 1)


# ---- ablation


def fixed_loss(model):
    return lambda: model(**rows()).loss.item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ("order", "reverse"))
def test_ablation_is_the_loss_of_a_model_without_those_numbers(form, order):
    model = whole(form=form, amplitude_dropout=0.3).train()
    whole_loss = fixed_loss(model.eval())()
    model.train()
    found = ablation(model, fixed_loss(model), [0, 2, 4, 6, 99], order)
    assert list(found) == ["0", "2", "4", "6", "99"] and len(set(found.values())) == 4
    assert found["6"] == found["99"] == whole_loss
    assert found["0"] == fixed_loss(tiny())()
    for count in (2, 4):
        twin_of_it = whole(form=form)
        for c in coefficients(twin_of_it).values():
            gone = range(count, 6) if order == "order" else range(6 - count)
            for i in gone:
                c.data[..., i] = 0
                if form == "core":
                    c.data[i] = 0
        assert found[str(count)] == fixed_loss(twin_of_it)()


def test_ablation_at_random_is_seeded_nested_and_by_matrix():
    model, kept = whole(), []

    def seen():
        kept.append({n: (c != 0).nonzero().flatten().tolist() for n, c in coefficients(model).items()})
        return 0.0

    ablation(model, seen, [2, 4], "random", seed=1)
    ablation(model, seen, [2], "random", seed=1)
    ablation(model, seen, [2], "random", seed=2)
    two, four, again, other = kept
    assert two == again != other
    assert all(len(two[n]) == 2 and len(four[n]) == 4 and set(two[n]) < set(four[n]) for n in two)
    assert len({tuple(v) for v in two.values()}) > 1


def test_ablation_restores_the_numbers_bit_for_bit():
    model = whole().train()
    before = {n: (c.data_ptr(), c.detach().clone()) for n, c in coefficients(model).items()}

    def broken():
        raise KeyError

    ablation(model, lambda: 0.0, [0, 3], "random")
    with pytest.raises(KeyError):
        ablation(model, broken, [3])
    for name, c in coefficients(model).items():
        assert c.data_ptr() == before[name][0] and model.training
        assert_same_bits(c.detach(), before[name][1])


def test_mistakes_in_an_ablation():
    with pytest.raises(CTError, match="order='best' is unknown; choose one of order, reverse, random"):
        ablation(whole(), lambda: 0.0, [1], "best")
    with pytest.raises(CTError, match="kept=-1 must be a number of directions, at least 0"):
        ablation(whole(), lambda: 0.0, [1, -1])
