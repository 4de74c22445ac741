import importlib.util
import json
import sys
from pathlib import Path

import pytest

from ctsft.data.rows import load_corpus

SCRIPTS = Path(__file__).parents[1] / "scripts"
BOOK = "The Old Testament\n\n\n\nThe First Book of Moses:  Called Genesis\n\n\n1:1 In the beginning.\n\n1:2 And.\n"


@pytest.fixture(scope="module")
def families():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        spec = importlib.util.spec_from_file_location("families", SCRIPTS / "families.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    sys.modules.pop("fetch", None)


def test_databases_are_the_questions_of_sql_by_domain(families, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "QUESTIONS", {"train": 60, "heldout": 40})
    families.main(["databases", "--out", str(tmp_path)])
    paths = sorted(tmp_path.iterdir())
    rows = {path: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}
    assert sum(map(len, rows.values())) == 100 and len(paths) > 20
    for path, found in rows.items():
        assert path.suffix == ".jsonl"
        assert all(row["completion"].endswith(";") for row in found)
    most = max(paths, key=lambda path: len(rows[path]))
    assert load_corpus(str(most), heldout=1).kind == "prompt_completion"


def test_books_of_the_bible_begin_with_their_titles(families, monkeypatch):
    monkeypatch.setattr(families, "BIBLE", {"genesis": "Called Genesis", "ruth": "The Book of Ruth"})
    more = "\n\n\nThe Book of\nRuth the\n\n\nNot a title\n\n\nThe Book of Ruth\n\n\n1:1 Now it came.\n"
    monkeypatch.setattr(families, "book", lambda name: BOOK + more)
    found = families.bible()
    assert list(found) == ["genesis", "ruth"] and found["ruth"] == "1:1 Now it came.\n"
    assert found["genesis"].startswith("1:1 In the beginning.\n\n1:2 And.")


def test_a_text_is_cut_at_a_line(families, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "LONGEST", 12)
    monkeypatch.setattr(families, "FAMILIES", {"one": lambda: {"a": "four\nfive\nsix\nseven", "b": "short"}})
    families.main(["one", "--out", str(tmp_path)])
    assert (tmp_path / "one-a.txt").read_text() == "four\nfive\n"
    assert (tmp_path / "one-b.txt").read_text() == "short\n"


def test_libraries_are_source_text_without_tests(families, tmp_path, monkeypatch):
    package = tmp_path / "somepackage"
    (package / "tests").mkdir(parents=True)
    for name in ("__init__", "a", "b", "tests/test_a"):
        (package / f"{name}.py").write_text(f"# {name}\n" * 20)
    (package / "tiny.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(families, "LIBRARIES", ("somepackage",))
    monkeypatch.setattr(families, "SHORTEST", 50)
    text = families.libraries()["somepackage"]
    assert "# a\n" in text and "# b\n" in text and "test_a" not in text and "x = 1" not in text
    monkeypatch.setattr(families, "LIBRARIES", ("nowhere_to_be_found",))
    with pytest.raises(SystemExit, match="nowhere_to_be_found is not installed"):
        families.libraries()


def test_an_unknown_family(families, tmp_path):
    with pytest.raises(SystemExit, match="there is no family nobody; there are authors, bible, databases, libraries"):
        families.main(["nobody", "--out", str(tmp_path)])
