"""Rooms: a file imports only from rooms below its own, and inside a room from files above it in the list."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ctsft"

ROOMS = {  # the lowest first; "" holds the small files that all use
    "": ["errors", "choices", "files", "progress", "compat"],
    "data": [
        *("sql.words", "sql.schemas", "sql.phrases", "sql.questions"),
        *("sql.query", "sql.worker", "sql.execution", "sql.examples"),
        *("read", "rows", "siblings", "template", "tokens"),
    ],
    "models": ["photonic", "reading", "gguf", "load"],
    "spectral": ["decompose", "weights", "basis", "collect", "kinds", "universal", "cache"],
    "adapter": [
        *("seal", "config", "forms", "fused", "layer", "store", "read", "swap", "bare", "targets"),
        *("bases", "arithmetic", "model", "resize", "calibrate", "export", "loss", "rate", "learned", "learn", "peers"),
    ],
    "quantities": ["gradients", "look", "ablation"],
    "probe": [],
    "pages": ["words", "plot", "render"],
    "tune": [
        "recipe",
        "record",
        "report",
        "inspect",
        "measure",
        "trainer",
        "folder",
        "material",
        "run",
        "lesson",
        "learn",
    ],
    "plan": [
        *("arms", "asked", "contest", "record", "rates", "standing", "trial", "page", "compare"),
        *("budget", "predict", "choose", "question", "told", "frontier", "plan", "automatic"),
    ],
    "lab": [
        *(
            "schedule",
            "spec",
            "records",
            "rates",
            "own",
            "experiments",
            "lone",
            "allocations",
            "methods",
            "sources",
            "siblings",
        ),
        *("prefix", "rules", "run"),
        *("engines", "sweep", "metrics", "stats", "compare", "windows", "tables"),
        *("claims", "predicates", "opened"),
        *("verdicts", "second", "summary", "beside"),
        *("drawing", "figures", "page"),
    ],
    "cli": ["console", "options", "lab", "compare", "plan", "tune", "basis", "adapter", "inspect", "main"],
}
# Plain values: verdicts, reports and --help are made without torch.
NO_TORCH = {
    *("errors", "choices", "files", "progress", "compat", "tune.recipe", "tune.record", "tune.report"),
    *(
        "cli.console",
        "cli.options",
        "cli.basis",
        "tune.lesson",
        "cli.lab",
        "cli.tune",
        "cli.adapter",
        "cli.inspect",
        "cli.compare",
        "cli.main",
    ),
    *("data.sql.words", "data.sql.schemas", "data.sql.phrases", "data.sql.questions", "data.sql.query"),
    *("data.sql.worker", "data.sql.execution", "data.sql.examples", "data.template"),
    *("pages.words", "pages.plot", "pages.render"),
    *("plan.arms", "plan.record", "plan.budget", "plan.predict", "plan.choose", "plan.question", "plan.told"),
    *("plan.frontier", "cli.plan"),
    *("plan.asked", "plan.contest", "plan.rates", "plan.standing", "plan.page"),
    *("lab.schedule", "lab.spec", "lab.records", "lab.rates", "lab.own", "lab.experiments", "lab.engines"),
    *("lab.sweep", "lab.metrics", "lab.stats", "lab.compare", "lab.windows", "lab.tables"),
    *("lab.claims", "lab.predicates"),
    *(
        "lab.opened",
        "lab.verdicts",
        "lab.second",
        "lab.summary",
        "lab.beside",
        "lab.drawing",
        "lab.figures",
        "lab.page",
    ),
}
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate"}


def room_order():
    """The names of all files, the lowest first."""
    for room, names in ROOMS.items():
        yield from [f"{room}.{name}" if room else name for name in names] or [room]


ORDER = list(room_order())
FILES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in SOURCE.glob("**/*.py")
    if path.stem not in ("__init__", "__main__")
)


def parsed(name):
    return ast.parse((SOURCE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))


def imported(tree):
    """Names of the ctsft modules that a parsed file imports, anywhere in it; `ctsft` for the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import in full, from ctsft.name import ..."
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = whole if ROOMS.get(node.module.removeprefix("ctsft."), node.module == "ctsft") else [node.module]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "ctsft":
                yield rest or "ctsft"


def test_imported_sees_every_way_to_import():
    text = (
        "import ctsft.a\nimport os, ctsft.b as b\nfrom ctsft.c import x\nfrom ctsft import d\ndef f():\n import ctsft"
    )
    assert list(imported(ast.parse(text))) == ["a", "b", "c", "d", "ctsft"]
    with pytest.raises(AssertionError, match="write the import in full"):
        list(imported(ast.parse("from .a import x")))


def test_every_file_has_its_room():
    assert len(ORDER) == len(set(ORDER))
    assert set(FILES) == set(ORDER), "add the new file to ROOMS"


@pytest.mark.parametrize("name", FILES)
def test_imports_only_from_below(name):
    below = ORDER[: ORDER.index(name)]
    assert set(imported(parsed(name))) <= set(below), f"{name} may import only {below}"


@pytest.mark.parametrize("room", [room for room in ROOMS if room])
def test_a_room_says_what_it_is_for_and_imports_nothing(room):
    path = SOURCE / room / "__init__.py"
    if path.exists():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1 and ast.get_docstring(ast.Module(body, []))


@pytest.mark.parametrize("name", FILES)
def test_torch_is_imported_only_where_tensors_are(name):
    top = [node for node in parsed(name).body if isinstance(node, ast.Import | ast.ImportFrom)]
    heavy = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
    heavy |= {node.module.split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    ours = {found for node in top for found in imported(ast.Module([node], []))}
    assert bool(heavy & HEAVY or ours - NO_TORCH) != (name in NO_TORCH)


@pytest.mark.parametrize("name", [name for name in FILES if name != "data.sql.words"])
def test_no_file_and_no_function_is_long(name):
    tree = parsed(name)
    assert max((node.end_lineno for node in tree.body), default=0) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{name}.{node.name} is over 60 lines"
