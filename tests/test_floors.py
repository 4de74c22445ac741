"""A file imports only from those before it in this table, so that it can be read, and tested, without the rest."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ctsft"

# A lower floor knows nothing of a higher one; within a floor, and so in the whole table, the order counts too.
FLOORS = {
    0: [
        "errors",
        "record",
        "recipe",
        "sql",
        "schedule",
        "experiment",
        "summary",
        "stats",
        "claim",
    ],  # plain values, no torch
    1: ["spectrum", "basis", "fused"],  # tensor algebra
    2: ["weights", "cache", "photonic", "corpus", "models", "universal"],  # what is adapted, and the text
    3: ["config", "layer", "store", "tuner", "calibration", "export", "inspection"],  # the adapter
    4: ["report", "lab_figures", "lab_report"],  # pages from plain records
    5: ["train", "probe", "arms", "lab", "sweep"],
    6: ["cli_lab", "cli"],
}
ORDER = [name for floor in FLOORS.values() for name in floor]
FILES = sorted(path.stem for path in SOURCE.glob("**/*.py") if path.stem not in ("__init__", "__main__"))


def imported(tree):
    """Names of the ctsft modules that a parsed file imports, anywhere in it; `ctsft` for the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import in full, from ctsft.name import ..."
            names = [node.module] if node.module != "ctsft" else [f"ctsft.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "ctsft":
                yield rest.split(".")[0] or "ctsft"


def test_imported_sees_every_way_to_import():
    text = (
        "import ctsft.a\nimport os, ctsft.b as b\nfrom ctsft.c import x\nfrom ctsft import d\ndef f():\n import ctsft"
    )
    assert list(imported(ast.parse(text))) == ["a", "b", "c", "d", "ctsft"]
    with pytest.raises(AssertionError, match="write the import in full"):
        list(imported(ast.parse("from .a import x")))


def test_every_file_has_its_floor():
    assert len(ORDER) == len(set(ORDER))
    assert set(FILES) == set(ORDER), "add the new file to FLOORS"


@pytest.mark.parametrize("name", FILES)
def test_imports_only_from_below(name):
    tree = ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))
    below = ORDER[: ORDER.index(name)]
    assert set(imported(tree)) <= set(below), f"{name}.py may import only {below}"


@pytest.mark.parametrize("name", [name for name in FILES if name in FLOORS[0]])
def test_the_lowest_floor_needs_no_torch(name):
    tree = ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))
    roots = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    roots |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not roots & {"torch", "transformers", "peft", "trl", "datasets"}
