"""The table of kinds of basis: that it says what its makers do."""

import pytest
import torch

from ctsft import CTConfig, CTError, choices
from ctsft.adapter.bases import maker, origin
from ctsft.spectral import kinds
from ctsft.spectral.kinds import KINDS, kind_of, needs_data
from ctsft.spectral.weights import matrix
from helpers import BASES, FORMS, adapt, owners, ready_config, tiny


def test_every_kind_has_its_word_and_every_word_its_kind():
    assert tuple(KINDS) == choices.BASES == BASES
    assert all((kind.maker is None) != (kind.calibration is None) for kind in KINDS.values())


def test_an_unknown_kind_is_an_error():
    for ask in (kind_of, needs_data):
        with pytest.raises(CTError, match=r"basis='other' is unknown; choose one of weight, random, "):
            ask("other")


def test_what_is_made_from_data_must_be_stored():
    assert [name for name in KINDS if needs_data(name)] == ["gradient", "activation"]
    assert [name for name, kind in KINDS.items() if kind.stored] == ["gradient", "activation"]


def sides(basis):
    return {"u": basis.u is not None, "vh": basis.vh is not None}


@pytest.mark.parametrize("name", BASES)
def test_a_kind_makes_the_sides_that_it_says_and_the_number_asked_for(name):
    base = tiny()
    config = ready_config(base, basis=name)
    make, seen = maker(base, config, [4]), []
    for module in owners(adapt(tiny(), target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])):
        basis = make(module, matrix(base.get_submodule(module)).detach(), 4)
        assert basis.k == 4
        seen.append(sides(basis))
    expected = {"input": [{"u": False, "vh": True}], "either": [{"u": False, "vh": True}, {"u": True, "vh": False}]}
    for found in seen:
        assert found in expected.get(KINDS[name].sides, [{"u": True, "vh": True}])
    assert KINDS[name].sides != "either" or len({tuple(s.values()) for s in seen}) == 2


@pytest.mark.parametrize(
    ("name", "one", "both"),
    [
        ("weight", 5, 5),
        ("random", 9, 5),
        ("universal", 9, 5),
        ("gradient", 5, 5),
        ("activation", 9, 5),
        ("file", 9, 5),
        ("learned", 9, 5),
    ],
)
def test_the_most_directions_of_a_matrix(name, one, both):
    assert KINDS[name].most(torch.Size([5, 9]), both=False) == one
    assert KINDS[name].most(torch.Size([5, 9]), both=True) == both
    assert KINDS["universal"].most(torch.Size([9, 5]), both=False) == 9
    assert KINDS["random"].most(torch.Size([9, 5]), both=False) == 5


def test_what_decides_the_directions():
    def differ(one, other):
        return origin(CTConfig(**one)) != origin(CTConfig(**other))

    universal = {"basis": "universal"}
    assert differ({}, {"basis": "random"}) and differ({}, universal)
    assert differ({}, {"weight_from": "bottom"}) and not differ({"seed": 1}, {})
    assert differ({"weight_from": "random", "seed": 1}, {"weight_from": "random"})
    assert differ({"basis": "random", "seed": 1}, {"basis": "random"}) and not differ(
        universal, universal | {"seed": 1}
    )
    assert differ(universal, universal | {"form": "scores"}) and not differ(universal, universal | {"form": "core"})
    assert differ(universal | {"form": "scores"}, universal | {"form": "scores", "universal_mode": "replace"})
    assert not any(differ({"form": form}, {}) for form in FORMS)


def test_the_universal_basis_of_the_last_model_is_made_once(monkeypatch):
    made = []
    make = kinds.universal_gram
    monkeypatch.setattr(kinds, "LAST_UNIVERSAL", {})
    monkeypatch.setattr(kinds, "universal_gram", lambda *a: made.append(1) or make(*a))
    first, again = (kinds.universal_directions(tiny(), 16) for _ in range(2))
    assert first is again and len(made) == 1
    other = tiny()
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1e-3
    assert not torch.equal(kinds.universal_directions(other, 16), first)
    assert len(made) == 2 and len(kinds.LAST_UNIVERSAL) == 1
