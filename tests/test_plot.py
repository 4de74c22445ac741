import re

from ctsft.pages.plot import LIGHT, plot


def drawn(name="a", label="what is seen"):
    return plot(lambda ax: ax.plot([0, 1], [0, 1], color=LIGHT["c0"]), (3, 2), name, label)


def test_colours_become_those_of_the_page():
    svg = drawn()
    assert svg.startswith("<svg viewBox=") and 'aria-label="what is seen"' in svg
    assert "var(--c0)" in svg and not re.findall(r"#[0-9a-f]{6}\b", svg) and "<metadata>" not in svg


def test_the_same_picture_twice_is_the_same_text_and_ids_are_those_of_its_name():
    assert drawn() == drawn()
    ids = [set(re.findall(r'id="([^"]+)"', drawn(name))) for name in ("a", "b")]
    assert ids[0] and not ids[0] & ids[1] and all(found.startswith("a-") for found in ids[0])


def test_nothing_to_draw_is_nothing():
    assert plot(None, (3, 2), "a", "nothing") == ""
