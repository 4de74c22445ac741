from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsft.errors import CTError
from ctsft.lab.schedule import counted_parameters, k_at, parse_schedule

PHOTONIC = [(768, 256), (256, 256), (1024, 256), (256, 1024)] * 8 + [(15007, 256)]  # the papers' 33 matrices


@st.composite
def stages(draw):
    """[(start, K), ...] with starts that rise from 0 to below 1."""
    ks = draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    shares = st.fractions(0, 1, max_denominator=40).filter(lambda share: 0 < share < 1)
    starts = draw(st.lists(shares, min_size=len(ks) - 1, max_size=len(ks) - 1, unique=True))
    return list(zip([Fraction(0), *sorted(starts)], ks, strict=True))


def written(stages):
    return ">".join(f"{k}@{s.numerator}/{s.denominator}" if s else f"{k}" for s, k in stages)


@given(stages())
def test_what_is_written_is_read(stages):
    assert parse_schedule(written(stages)) == stages
    assert parse_schedule(" > ".join(written(stages).split(">"))) == stages


@given(stages(), st.integers(1, 200))
def test_k_at_is_the_last_stage_that_has_begun(stages, steps):
    text = written(stages)
    found = [k_at(text, step, steps) for step in range(steps)]
    slow = []
    for step in range(steps):
        k = None
        for start, stage in stages:
            if Fraction(step, steps) >= start:
                k = stage
        slow.append(k)
    assert found == slow
    assert found[0] == stages[0][1]


@given(st.text("0123456789>@/. x-", max_size=12))
def test_any_other_text_is_one_sentence(text):
    try:
        found = parse_schedule(text)
    except CTError as error:
        assert str(error).startswith(f"the schedule {text!r} ")
    else:
        assert parse_schedule(written(found)) == found


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("32", 40, [32] * 40),
        ("8>16@1/2", 40, [8] * 20 + [16] * 20),
        ("2>16@1/3", 40, [2] * 14 + [16] * 26),  # 13.3: the fourteenth step has begun before a third is over
        ("2>4@1/4>8@1/2>16@3/4", 40, [2] * 10 + [4] * 10 + [8] * 10 + [16] * 10),  # paper 81's staircase
        ("16>2@1/2", 1, [16]),
    ],
)
def test_the_papers_schedules(text, steps, expected):
    assert [k_at(text, step, steps) for step in range(steps)] == expected


@pytest.mark.parametrize(
    "text",
    ["", ">", "8>", "x", "8@1/2", "8>16", "8>16@1", "8>16@0.5", "0", "8>0@1/2", "-8", "8>16@1/0", "8>16@-1/2", "8 16"],
)
def test_what_is_no_schedule(text):
    with pytest.raises(CTError, match=r"is not like 8>16@1/2 \(K, then K@start, starts as shares of the run\)\.$"):
        parse_schedule(text)


@pytest.mark.parametrize("text", ["8>16@1/1", "8>16@3/2", "8>16@0/2", "8>16@1/2>4@1/2", "8>16@1/2>4@1/3"])
def test_starts_must_rise_and_stay_below_one(text):
    with pytest.raises(CTError, match=r"needs starts that rise and stay below 1\.$"):
        parse_schedule(text)


@given(st.integers(0, 512), st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), max_size=8))
def test_counted_parameters_are_those_of_lora(k, shapes):
    factors = [(d_out, k) for d_out, _ in shapes] + [(k, d_in) for _, d_in in shapes]
    assert counted_parameters(k, shapes) == sum(rows * columns for rows, columns in factors)


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16, 32, 64])
def test_the_papers_count_is_48031_k(k):
    assert counted_parameters(k, PHOTONIC) == 48_031 * k
