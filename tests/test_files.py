import os
import re
import sys
from importlib.metadata import version

import pytest

from ctsft.errors import CTError
from ctsft.files import PACKAGES, home, read_json, read_toml, replacing, versions, wilson, write_json, write_text


def test_json_comes_back_and_folders_are_made(tmp_path):
    value = {"a": [1, 2.5, None, True], "text": "ä \N{SNOWMAN}"}
    write_json(tmp_path / "new" / "er" / "a.json", value)
    assert read_json(tmp_path / "new" / "er" / "a.json") == value
    assert [p.name for p in (tmp_path / "new" / "er").iterdir()] == ["a.json"]


def test_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function, error):
    write_text(tmp_path / "a", "old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(error):
        write_text(tmp_path / "a", "new")
    monkeypatch.undo()
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_nan_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}x', b"\xff\xfe", None])
def test_damaged_json_is_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CTError, match=r"a\.json cannot be read as JSON"):
        read_json(tmp_path / "a.json")


def test_toml_is_read_and_what_is_none_is_one_sentence(tmp_path):
    (tmp_path / "a.toml").write_text('[b]\nc = "ä"\n', encoding="utf-8")
    assert read_toml(tmp_path / "a.toml") == {"b": {"c": "ä"}}
    (tmp_path / "a.toml").write_bytes(b"[b\xff")
    with pytest.raises(CTError, match=r"a\.toml is no TOML: "):
        read_toml(tmp_path / "a.toml")
    with pytest.raises(CTError, match=r"none\.toml cannot be read \(No such file or directory\)\.$"):
        read_toml(tmp_path / "none.toml")


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def test_home_is_ours_then_the_systems(tmp_path, monkeypatch):
    monkeypatch.setenv("CTSFT_CACHE", "~/here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / "here"
    monkeypatch.delenv("CTSFT_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert home() == tmp_path / "xdg" / "ctsft"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert home() == tmp_path / ".cache" / "ctsft"
    else:
        assert re.search("ctsft", str(home()))


def test_versions_are_those_installed():
    assert versions() == {name: version(name) for name in PACKAGES}
    assert {"ctsft", "torch", "peft"} <= set(PACKAGES)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(hits, total, low, high):
    assert wilson(hits, total) == pytest.approx((low, high), abs=6e-5)
