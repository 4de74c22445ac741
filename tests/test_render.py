import os

import pytest
from jinja2 import DictLoader, Environment, UndefinedError

from ctsft.pages import render
from ctsft.pages.plot import COLOURS
from ctsft.pages.render import environment, write_page


def test_style_has_every_colour_in_light_and_dark():
    style = environment().get_template("style.css").render(palette=COLOURS)
    for name, (light, dark) in COLOURS.items():
        assert f"--{name}: {light}; " in style and f"--{name}: {dark}; " in style


def test_what_is_inserted_is_escaped_and_numbers_have_words():
    page = environment().from_string("{{ text }} {{ 12345|number }} {{ 0.5|percent }} {{ none|words }} {{ 999|size }}")
    assert page.render(text="<b>") == "&lt;b&gt; 12,345 50% none 999 bytes"


def test_half_a_character_is_no_reason_to_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "environment", lambda: Environment(loader=DictLoader({"a.html": "x{{ text }}y"})))
    write_page("a.html", tmp_path / "a.html", {"text": "\ud83d"})
    assert (tmp_path / "a.html").read_text() == "x?y"


def test_an_unfinished_page_is_not_left(tmp_path):
    with pytest.raises(UndefinedError):
        write_page("report.html", tmp_path / "a.html", {"run": 1, "curve": 3})
    assert os.listdir(tmp_path) == []
