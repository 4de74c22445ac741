"""The sentences that open VERDICTS.md: told only while the records bear them out."""

import re

import pytest

from ctsft.errors import CTError
from ctsft.lab.claims import read_claims
from ctsft.lab.experiments import PAPERS, read_laboratory
from ctsft.lab.records import Records
from ctsft.lab.summary import summary
from ctsft.lab.verdicts import judge, markdown
from synthetic import claim, laboratory, record, run

LOWER = claim("less", a={"k": 4}, b={"k": 2}, effect=0.02)
TEXT = """
[[sentence]]
text = "It says nothing of a claim."

[[sentence]]
text = "K=4 is {1 size} nats ahead, or {1 points} hundredths, in all {1 mean}."
confirmed = ["1"]

[[sentence]]
text = "K=4 is not ahead."
refuted = ["1"]
"""


def judged(losses):
    lab = laboratory({"k": [2, 4]})
    return judge([LOWER], lab, run(lab, lambda s: record(s, [9.0, losses[s.k] + 0.001 * s.seed * s.k])))


def told(folder, text, losses=None):
    (folder / "summary.toml").write_text(text)
    return summary(folder, judged(losses or {2: 8.0, 4: 7.5}))


def test_a_sentence_is_told_while_its_claims_have_the_verdicts_that_it_names(tmp_path):
    assert told(tmp_path, TEXT) == [
        "It says nothing of a claim.",
        "K=4 is 0.5 nats ahead, or 50 hundredths, in all 0.5.",
    ]
    assert told(tmp_path, TEXT, {2: 7.5, 4: 8.0}) == ["It says nothing of a claim.", "K=4 is not ahead."]
    assert told(tmp_path, TEXT, {2: 8.0, 4: 7.979}) == ["It says nothing of a claim."]  # open


def test_a_folder_without_the_file_has_no_summary(tmp_path):
    assert summary(tmp_path, judged({2: 8.0, 4: 7.5})) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('refuted = ["1"]', 'refuted = ["7"]'), "no claim, or no number, '7'"),
        (("{1 size}", "{9 size}"), "no claim, or no number, '9'"),
        (("{1 size}", "{1 height}"), "no claim, or no number, 'height'"),
        (('confirmed = ["1"]', 'sure = ["1"]'), "sure"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, change, message):
    with pytest.raises(CTError, match=rf"summary\.toml is wrong: .*{message}"):
        told(tmp_path, TEXT.replace(*change))


def test_the_sentences_open_the_page_of_verdicts():
    text = markdown(judged({2: 8.0, 4: 7.5}), summary=["One.", "Two."])
    assert re.search(r"1 claims\.\n\n1\. One\.\n2\. Two\.\n\nProfile", text)


def test_the_committed_records_bear_out_all_ten():
    """Where a verdict has changed, the sentence that rests on it is to be written anew."""
    root = PAPERS.parents[3]
    verdicts = judge(read_claims(PAPERS / "claims.toml"), read_laboratory(), Records(root / "records"))
    sentences = summary(PAPERS, verdicts)
    assert len(sentences) == 10
    text = (root / "VERDICTS.md").read_text(encoding="utf-8")
    assert all(f"{i}. {sentence}" in text for i, sentence in enumerate(sentences, 1))
    assert not any("{" in sentence for sentence in sentences)
