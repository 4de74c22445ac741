"""Chat templates of others: what takes too long or too much is found out in a process of its own."""

import time

import pytest

from ctsft.data import template
from ctsft.data.template import is_bounded
from test_tokens import CHAT

LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% set a = i * j %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 2)
    is_bounded.cache_clear()
    yield
    is_bounded.cache_clear()


@pytest.mark.parametrize(
    "good", [CHAT, "{{ 1 / 0 }}", "{% for", "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}"]
)
def test_what_ends_soon_is_bounded(good):
    assert is_bounded(good)


@pytest.mark.parametrize(
    "bad",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 'x' | center(10**10) }}",
        "{% set n = namespace(s='x') %}{% for i in range(64) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
        "{% if messages[-1].role == 'assistant' %}{{ 'x' * 10**10 }}{% endif %}",
        LOOP,
    ],
)
def test_what_takes_too_much_is_not(bad):
    started = time.monotonic()
    assert not is_bounded(bad)
    assert time.monotonic() - started < 40


def test_one_that_waits_is_ended_by_the_clock(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.01)
    assert not is_bounded(CHAT)


def test_a_template_is_tried_once(monkeypatch):
    assert is_bounded(CHAT)
    monkeypatch.setattr(template.subprocess, "run", None)
    assert is_bounded(CHAT)
