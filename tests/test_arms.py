"""Candidates by name."""

import pytest

from ctsft import CTError
from ctsft.plan.arms import ARMS, DEFAULT, Candidate, candidate


@pytest.mark.parametrize("name", [*DEFAULT, "diagonal-1@weight", "core-8@gradient", "scores-2@universal"])
def test_a_name_says_the_candidate_and_the_candidate_its_name(name):
    found = candidate(name)
    assert found.name == name and candidate(found.name) == found and found.arm is ARMS[found.method]


def test_a_form_has_random_directions_unless_others_are_named(tmp_path, monkeypatch):
    assert candidate("diagonal-64") == Candidate("diagonal", 64, "random") == candidate("diagonal-64@random")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "basis.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    found = candidate("gains-8@shared")
    assert found == Candidate("gains", 8, "learned", str(tmp_path / "shared")) and candidate(found.name) == found


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lorra-8", "there is no arm 'lorra-8'; write one of diagonal, core, gains, scores, lora, vera, norms"),
        ("diagonal-064", "there is no arm"),
        ("diagonal-0", "there is no arm"),
        ("", "there is no arm"),
        ("lora-8\nx", "there is no arm"),
        ("lora", "lora needs a K; write lora-64"),
        ("norms-3", "norms has no K; write norms"),
        ("lora-8@weight", "lora has no basis; write lora-8"),
        ("diagonal-4@wieght", "'wieght' in 'diagonal-4@wieght' is neither a kind of basis (weight, random"),
        ("diagonal-4@learned", "nor learned directions"),
    ],
)
def test_another_name_is_one_sentence(name, told):
    with pytest.raises(CTError) as error:
        candidate(name)
    assert told in str(error.value) and "\n" not in str(error.value)
