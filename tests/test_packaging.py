"""What pyproject.toml, the Makefile and the workflow say is what the code needs."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import ctsft
from ctsft.errors import extra_with
from test_floors import FILES, parsed

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# The extra whose packages a room may import; a room that is not here needs none.
EXTRA_OF = {"data": "tune", "pages": "tune", "tune": "tune", "plan": "tune", "lab": "lab"}
PLAIN = {"tune.recipe"}  # the command line reads it, whatever is installed


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


@lru_cache
def packages(extra):
    """Names of the packages that `pip install ctsft[extra]` asks for, without those that they bring."""
    found = {name_of(line) for line in PROJECT["dependencies"]}
    for line in EXTRAS[extra] if extra else ():
        inner = re.fullmatch(r"ctsft\[(.+)\]", line)
        found |= set().union(*map(packages, inner[1].split(","))) if inner else {name_of(line)}
    return found


def foreign(tree, extra):
    """(root module, extra) of every import of another's package; the extra is that of a `with needs(...)` around it."""
    for node in ast.iter_child_nodes(tree):
        inside = extra
        if isinstance(node, ast.With):
            call = node.items[0].context_expr
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "needs" and call.args:
                inside = call.args[0].value
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for root in {name.partition(".")[0] for name in names}:
            if root != "ctsft" and root not in sys.stdlib_module_names:
                yield root, inside
        yield from foreign(node, inside)


def test_foreign_sees_imports_and_the_needs_around_them():
    text = "import os, a.b\nfrom c import d\nimport ctsft.e\ndef f():\n with needs('ray'):\n  import ray\n import g"
    assert list(foreign(ast.parse(text), "")) == [("a", ""), ("c", ""), ("ray", "ray"), ("g", "")]


@pytest.mark.parametrize("name", FILES)
def test_what_is_imported_is_declared(name):
    extra = "" if name in PLAIN else EXTRA_OF.get(name.partition(".")[0], "")
    for root, needed in foreign(parsed(name), extra):
        declared = packages(needed) | packages(extra)
        assert root.lower().replace("_", "-") in declared, f"{name} imports {root}, which ctsft[{needed}] does not have"


def test_the_plugin_asks_for_little_and_all_for_everything():
    assert packages("") < packages("tune") < packages("lab") < packages("all") < packages("dev")
    assert not packages("") & {"trl", "datasets", "jinja2", "matplotlib", "scipy", "gguf", "ctsft-photonic"}
    assert packages("all") == packages("lab") | packages("ray") | packages("plots") | packages("tune")


def test_every_direct_dependency_is_pinned():
    pins = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    own = {"ctsft-photonic"}
    assert not packages("dev") - own - pins


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("trl", "tune"),
        ("matplotlib", "plots"),
        ("scipy", "tune"),
        ("markupsafe", "lab"),
        ("ctsft-photonic", "lab"),
        ("no-such", "all"),
    ],
)
def test_the_extra_of_a_missing_package_is_known(package, extra):
    assert extra_with(package) == extra


def test_the_command_names_the_extra_that_is_missing(tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    code = f"""
import sys
sys.modules["datasets"] = sys.modules["trl"] = None
sys.argv = ["ctsft", "tune", "--model", "photonic", "--data", {str(data)!r}, "--out", {str(tmp_path / "run")!r}]
from ctsft.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: (trl|datasets) is needed here and not installed: pip install 'ctsft\[tune\]'\.\n", done.stderr
    )


def test_types_travel_with_the_package():
    assert (Path(ctsft.__file__).parent / "py.typed").exists()
    assert PROJECT["version"] == ctsft.__version__ == version("ctsft")


@pytest.mark.parametrize("folder", [ROOT, ROOT / "packages" / "ctsft-photonic"], ids=["ctsft", "ctsft-photonic"])
def test_every_file_beside_the_code_is_in_the_wheel(folder):
    settings = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package, patterns in settings["package-data"].items():
        source = folder / "src" / package
        kept = {path for pattern in patterns for path in source.glob(pattern)}
        beside = {p for p in source.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".lock")}
        assert beside == {path for path in kept if path.is_file()}


# ---- the forge

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def targets():
    return set(re.findall(r"(?m)^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8")))


def test_the_workflow_calls_make_targets_that_exist():
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    called = [step["run"] for step in steps if "run" in step]
    assert all(re.fullmatch(r"make [a-z]+", command) for command in called)
    assert {"make test", "make docs", "make dist"} <= set(called)
    assert {command.split()[1] for command in called} <= targets()
    assert re.findall(r"(?m)^\s*make (\w+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8")) == ["test"]


def test_the_workflow_runs_every_python_and_system_that_is_promised():
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}
    promised = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if line.count("::") == 2 and "3." in line]
    assert matrix["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"


def test_every_target_is_phony_and_told():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.search(r"(?m)^\.PHONY: (.*)$", text)[1].split()) == targets()
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert targets() - {"help"} <= set(re.findall(r"make ([a-z-]+)", contributing))
