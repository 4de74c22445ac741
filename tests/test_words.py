from ctsft.pages.words import duration, number, percent, place, size, visible, words


def test_sizes_and_durations():
    assert [size(999), size(54321), size(61_234_567), size(2.5e12)] == ["999 bytes", "54.3 kB", "61.2 MB", "2,500.0 GB"]
    assert [duration(7.04), duration(247.3), duration(7260)] == ["7.0 s", "4 min 7 s", "2 h 1 min"]


def test_settings():
    assert words({"a": [1, True], "b": None}) == "a: 1, yes, b: none" and words([]) == "none"
    assert [words(9999), words(10_000), words(0.5)] == ["9999", "10,000", "0.5"]


def test_numbers_and_shares():
    assert [number(12345), number(0.5, ".1%"), number(None), number(True)] == ["12,345", "50.0%", "\u2013", "\u2013"]
    assert [percent(0.5), percent(0.000123456)] == ["50%", "0.0123%"]


def test_the_place_of_a_matrix():
    assert place("model.layers.3.mlp.up_proj") == (3, "mlp.up_proj")
    assert place("lm_head") == (None, "lm_head")
    assert place("model.layers.11.mlp.experts.2.down_proj") == (11, "mlp.experts.*.down_proj")


def test_what_would_act_on_the_page_is_shown_as_its_code():
    assert (
        visible("a\x1b[31m\N{RIGHT-TO-LEFT OVERRIDE}\N{LINE SEPARATOR}\ud800\x00")
        == "a\\x1b[31m\\u202e\\u2028\\ud800\\x00"
    )
    joined = "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}"
    kept = f"two\nlines\tin \N{IDEOGRAPHIC SPACE}\N{NO-BREAK SPACE} {joined} \u05d0"
    assert visible(kept) == kept and visible("\r\n") == "\n" and visible(3) == 3
