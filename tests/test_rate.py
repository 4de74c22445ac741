"""The rule for the learning rate: its numbers, and what it reads of the model."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

import ctsft
from ctsft import CTConfig, CTError, resize
from ctsft.adapter.peers import peer_config, wrap
from ctsft.adapter.rate import Valley, gradient, growth, learning_rate, rate, valley
from ctsft.adapter.targets import find_targets
from ctsft.lab.rules import RULES
from helpers import FORMS, SHAPES, adapt, batches, coefficients, ids, owners, randomise, tiny


@pytest.mark.parametrize(
    ("form", "k", "scale", "lr"),
    [
        ("diagonal", 64, 5.737, 0.4),  # SmolLM2-135M
        ("diagonal", 64, 0.691, 0.048),  # a 15M model of width 288
        ("diagonal", 256, 1.0, 0.035),
        ("diagonal", 16, 1.0, 0.14),
        ("diagonal", 1, 1.0, 0.14),
        ("core", 64, 1.0, 0.004),
        ("core", 16, 1.0, 0.008),
        ("scores", 64, 2.0, 0.003),
    ],
)
def test_rate(form, k, scale, lr):
    assert rate(form, k, scale) == pytest.approx(lr)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_on_the_scale_of_the_adapted_weights(shape, form):
    model = adapt(tiny(shape), form=form)
    values = [torch.linalg.svdvals(m.base_layer.weight.detach()) for m in owners(model).values()]
    scale = statistics.median(float(s.square().mean().sqrt()) for s in values)
    assert learning_rate(model) == rate(form, 4, scale)
    assert ctsft.learning_rate is learning_rate


def test_the_largest_k_of_the_config_counts_also_after_a_resize():
    wide = {"hidden_size": 128, "intermediate_size": 128, "tie_word_embeddings": False}
    model = adapt(tiny(**wide), k={"v_proj": 48, ".*": 20})
    assert learning_rate(model) == learning_rate(adapt(tiny(**wide), k=48)) < learning_rate(adapt(tiny(**wide), k=20))
    resize(model, 20)
    assert learning_rate(model) == learning_rate(adapt(tiny(**wide), k=20))


def test_it_is_that_of_the_adapter_named_and_of_weights_without_a_merge():
    model = randomise(adapt(tiny()), scale=100.0)
    model.add_adapter("two", CTConfig(k=4, form="scores", target_modules=["q_proj"]))
    first, second = learning_rate(model), learning_rate(model, adapter_name="two")
    assert second == learning_rate(adapt(tiny(), form="scores", target_modules=["q_proj"])) < first
    model.merge_adapter()
    assert learning_rate(model) == first


def test_no_adapter_is_an_error():
    for model, name in ((tiny(), "default"), (adapt(tiny()), "two")):
        with pytest.raises(CTError, match=rf"no CT-SFT adapter '{name}', so there is nothing to give a rate for\."):
            learning_rate(model, adapter_name=name)


def test_a_name_in_the_place_of_batches_is_told():
    with pytest.raises(CTError, match=r"name the adapter by adapter_name='default'\."):
        learning_rate(adapt(tiny()), "default")


# ---- from batches


def slow_rate(model, given, numbers=None, least=0.3):
    """The rule word by word: plain backward passes of the model's own loss, all numbers in one vector."""
    numbers = numbers or list(coefficients(model).values())
    start = torch.cat([c.detach().flatten() for c in numbers])

    def gradient(at, batch):
        for c, part in zip(numbers, at.split([c.numel() for c in numbers]), strict=True):
            c.data.copy_(part.view_as(c))
        model.zero_grad()
        model(labels=batch["input_ids"], **batch).loss.backward()
        return torch.cat([c.grad.flatten() for c in numbers])

    each = [gradient(start, batch) for batch in given]
    total = sum(each)
    scale = 0.6 * float(each[0].norm()) ** -0.76 * len(start) ** -0.27
    first, found = float(each[0] @ total.sign()), []
    for share in (0.5, 2.0):
        left = float(gradient(start - share * scale * total.sign(), given[0]) @ total.sign())
        found.append(share * scale * first / (first - left) if left < first else 16 * scale)
    found = [min(max(t, scale / 16), scale * 16) for t in found]
    agree = sum(float(g @ (total - g).sign()) for g in each) / float(total @ total.sign())
    t = (found[0] * found[1]) ** 0.5
    alone = 0.9 * max(agree, least) * t
    halfway = gradient(start - t / 2 * total.sign(), given[0])[total == 0].abs().sum()
    grows = float(halfway) / (t / 4 * float(total.abs().sum()) / len(given))
    low, high = 0.0, alone
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (1 + grows * middle) < alone else (low, middle)
    return float(f"{high:.2g}"), float(f"{alone:.2g}")


def three():
    return [*batches(), {"input_ids": ids(seed=4)}]


@pytest.mark.parametrize("basis", ["weight", "gradient", "universal"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_far_as_the_sign_step_falls_on_other_batches_too(shape, form, basis):
    """With one factor alone, what the other one adds is nothing; with two it is not."""
    found = learning_rate(adapt(tiny(shape), form=form, basis=basis), three())
    slow, alone = slow_rate(adapt(tiny(shape), form=form, basis=basis), three())
    assert found == slow
    assert slow < alone if form == "gains" else slow == alone


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_it_is_the_same_rule_for_what_peers_train(method, k):
    def made():
        base = tiny()
        return wrap(base, peer_config(base, method, k, 0, list(find_targets(base, CTConfig())[0])), 0)

    model, twin = made(), made()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = valley(model, [p for p in model.parameters() if p.requires_grad], three())
    slow, alone = slow_rate(twin, three(), [p for p in twin.parameters() if p.requires_grad])
    assert found.rate == slow < alone == replace(found, growth=0.0).rate
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_autocast_sees_the_numbers_move():
    base = tiny()
    model = wrap(base, peer_config(base, "lora", 4, 0, list(find_targets(base, CTConfig())[0])), 0)
    numbers = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        right = valley(model, numbers, three())
    with torch.autocast("cpu", torch.bfloat16):
        assert valley(model, numbers, three()) == right
    assert right.growth > 0


@pytest.mark.parametrize("form", FORMS)
def test_the_laboratory_s_rules_are_this_one_and_what_it_was(form):
    """On batches that agree less than the floor, so that all three differ where they can."""
    model, noisy = adapt(tiny(), form=form), [{"input_ids": ids(1, 4, seed=s)} for s in range(8)]
    rates = {rule: RULES[rule](model, noisy) for rule in ("floor", "auto", "alone")}
    now, _ = slow_rate(adapt(tiny(), form=form), noisy)
    before, alone = slow_rate(adapt(tiny(), form=form), noisy, least=1 / 16)
    assert rates == {"floor": now, "auto": before, "alone": alone} and learning_rate(model, noisy) == now > before


@pytest.mark.parametrize("a", [0.1, 1.0, 10.0])
def test_two_factors_get_to_the_valley_together(a):
    """The loss (1 - b (a + c))^2 / 2 from b = c = 0: lowest where b = c = x with x (a + x) = 1; b alone takes 1 / a."""
    b, c = (torch.zeros(1, requires_grad=True) for _ in range(2))
    way = [torch.ones(1), torch.zeros(1)]

    def after(distance):
        b.data.fill_(distance)
        return torch.autograd.grad((1 - b * (a + c)).square().sum() / 2, (b, c))

    grows = growth(after, 1 / a, way, a)
    x = Valley(1 / (0.9 * a), 1.0, grows).rate
    assert x * (a + x) == pytest.approx(1, rel=0.1) and grows == pytest.approx(1 / a)


def test_one_factor_takes_no_further_pass(monkeypatch):
    passes = []
    measured = gradient
    monkeypatch.setattr("ctsft.adapter.rate.gradient", lambda *given: (passes.append(0), measured(*given))[1])
    for form in FORMS:
        learning_rate(adapt(tiny(), form=form, target_modules=["q_proj"]), three())
        assert len(passes) == (6 if form == "gains" else 5)
        passes.clear()


def test_halfway_is_nearer_where_it_is_not_finite():
    asked = []

    def after(distance):
        asked.append(distance)
        return [torch.ones(2), torch.full((2,), math.inf if distance > 1 else distance)]

    assert growth(after, 6.0, [torch.ones(2), torch.zeros(2)], 0.5) == pytest.approx(1.5 / (0.5 * 0.75 * 7 / 8))
    assert asked == [3.0, 1.5, 0.75]


def test_all_is_left_as_it_was():
    """Numbers, gradients, what trains, modes and random state; also where the adapter stands elsewhere than at zero."""
    model = randomise(adapt(tiny(), amplitude_dropout=0.5)).train()
    one = next(iter(coefficients(model).values()))
    one.grad = torch.ones_like(one)
    quiet = model.get_base_model().model.layers[0].eval()
    frozen = list(coefficients(model).values())[-1].requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(3)
    random = torch.get_rng_state()
    first = learning_rate(model, batches())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert (
        model.training
        and not quiet.training
        and not frozen.requires_grad
        and torch.equal(one.grad, torch.ones_like(one))
    )
    assert sum(p.requires_grad for p in model.parameters()) == len(coefficients(model)) - 1
    assert learning_rate(model, iter(batches())) == first


def test_a_mask_of_truths_is_one_of_ones():
    model = adapt(tiny())
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :3] = 0
    rates = [learning_rate(model, [b | {"attention_mask": m} for b in batches()]) for m in (mask, mask.bool())]
    assert rates[0] == rates[1]


def test_it_is_left_as_it_was_after_an_error(monkeypatch):
    model = adapt(tiny()).train()
    monkeypatch.setattr("ctsft.adapter.rate.line", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learning_rate(model, batches())
    assert model.training and not any(c.any() for c in coefficients(model).values())


@pytest.mark.parametrize("second", [math.nan, math.inf, -2.0, -1.0])
def test_a_slope_that_gives_no_valley_stays_within_bounds(second, monkeypatch):
    slopes = iter([-1.0, -1.0, -1.0, 1.0, second, -4.0])  # of both batches by the other's, the first, then; of all
    monkeypatch.setattr("ctsft.adapter.rate.slope", lambda *_: next(slopes))
    monkeypatch.setattr("ctsft.adapter.rate.line", lambda *_: 1.0)
    far = 16.0 if second < 0 else 1 / 16
    assert learning_rate(adapt(tiny()), batches()) == float(f"{0.9 * 0.5 * (0.25 * far) ** 0.5:.2g}")


def test_batches_that_do_not_agree_count_as_three_tenths(monkeypatch):
    slopes = iter([1.0, 1.0, -1.0, 1.0, 1.0, -4.0])
    monkeypatch.setattr("ctsft.adapter.rate.slope", lambda *_: next(slopes))
    monkeypatch.setattr("ctsft.adapter.rate.line", lambda *_: 1.0)
    assert learning_rate(adapt(tiny()), batches()) == float(f"{0.9 * 0.3 * (0.25 * 1.0) ** 0.5:.2g}")


def test_a_steeper_gradient_asks_for_a_smaller_rate():
    """Where the rule of the weights gives the same to both."""
    steep, flat = (adapt(tiny(), basis=basis) for basis in ("gradient", "random"))
    assert learning_rate(steep) == learning_rate(flat)
    alike = batches()[:1] * 2
    assert learning_rate(steep, alike) < learning_rate(flat, alike)


def test_what_gives_no_rate_is_one_sentence():
    model = adapt(tiny())
    with pytest.raises(CTError, match=r"got 1 of the two batches it needs"):
        learning_rate(model, batches()[:1])
    model.add_adapter("two", CTConfig(k=4))
    with pytest.raises(CTError, match=r"is zero on these batches.*is the adapter active"):
        learning_rate(model, batches(), "two")
    for c in coefficients(model).values():
        c.data.fill_(math.nan)
    with pytest.raises(CTError, match="is not finite on these batches"):
        learning_rate(model, batches())
