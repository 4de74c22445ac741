"""The loss of a model that keeps some directions only."""

import pytest

from ctsft import CTError
from ctsft.quantities.ablation import ablation
from helpers import EVEN, FORMS, assert_same_bits, coefficients, owners, rows, tiny, whole


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
                c.data[..., i - 6] = -EVEN if form == "gains" else 0
                if form == "core":
                    c.data[i] = 0
        assert found[str(count)] == fixed_loss(twin_of_it)()


@pytest.mark.parametrize("form", ["diagonal", "core"])
def test_dropped_directions_add_nothing_of_the_siblings_mean_either(form):
    model = whole(form=form, basis="learned", start="mean")
    found = ablation(model, fixed_loss(model), [0, 2, 6])
    for layer in owners(model).values():
        basis, c = layer.ctsft_basis["default"], layer.ctsft_coefficients["default"]
        c.data[..., 2:] = 0
        if form == "core":
            c.data[2:] = 0
        basis.start[2:] = 0
    assert found["0"] == fixed_loss(tiny())()
    assert found["2"] == pytest.approx(fixed_loss(model)(), rel=1e-5)
    assert found["6"] == pytest.approx(fixed_loss(whole(form=form, basis="learned", start="mean"))(), rel=1e-5)


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
