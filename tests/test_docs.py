"""The pages are true: their code runs, what they name exists, and what exists is named."""

import ast
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from typer.main import get_command

import tiny
from ctsft.cli import main as cli
from ctsft.lab.claims import ARGUMENTS, read_claims
from ctsft.lab.experiments import PAPERS, arms, read_laboratory
from ctsft.lab.records import Records
from ctsft.lab.verdicts import VERDICTS, judge

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402

# What torch says to everybody who trains without a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")

WRITTEN = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in generate.PAGES),
]
PAGES = [*WRITTEN, *(ROOT / "docs" / name for name in generate.PAGES)]
WORDS = 700
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
STAND_IN = {"smollm2-135m": "my-model", "path/or/hub-id": "my-model", "...": "red?"}  # in commands, word by word
NOT_RUN = {  # only looked at: do the target, the command and its options exist?
    "make": "needs an environment of its own, or minutes",
    "pip": "installs",
    "ctsft lab list": "tests/test_cli_lab.py lists all of them",
    "ctsft lab run": "minutes; tests/test_cli_lab.py runs a small laboratory from end to end",
    "ctsft lab verdicts": "tests/test_cli_lab.py holds VERDICTS.md to the records",
    "ctsft lab report": "tests/test_page.py writes the page",
    "ctsft basis learn": "minutes; tests/test_cli_basis.py learns",
    "ctsft tune --resume": "tests/test_tune_run.py kills and resumes",
}


def fences(path, language):
    """The code blocks of a Markdown file in `language`, as (line, text)."""
    tokens = MarkdownIt().parse(path.read_text(encoding="utf-8"))
    return [(t.map[0] + 1, t.content) for t in tokens if t.type == "fence" and t.info.strip() == language]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what the pages name: a model, rows, and a finished run."""
    folder = tmp_path_factory.mktemp("docs")
    tiny.save_model(folder / "my-model", hidden_size=128, intermediate_size=160)  # room for K = 64 and 128
    (folder / MODEL).parent.mkdir()
    (folder / MODEL).symlink_to("../my-model")
    tiny.save_rows(folder / "my.jsonl")
    (folder / "my.txt").write_text("".join(f"{w} is a colour, and a word.\n\n" for w in tiny.WORDS * 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        assert not command(["tune", "--model", "my-model", "--data", "my.jsonl", "--out", "runs/mine", "--steps", "2"])
        learn = ["basis", "learn", "--model", "my-model", "--data", "my.jsonl", "my.txt", "--steps", "2"]
        assert not command([*learn, "--out", "directions"])
    return folder


@pytest.fixture
def inside(world, tmp_path, monkeypatch):
    """In a copy of that folder, for every page its own."""
    shutil.copytree(world, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")


def command(words):
    """Run ctsft with `words`; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ctsft", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return stop.value.code


def parsed(words):
    """Parse the words of a ctsft command without running it: unknown commands and options are errors."""
    found, names = get_command(cli.app), list(words)
    while hasattr(found, "commands"):
        found = found.commands[names.pop(0)]
    with found.make_context("ctsft", names):
        pass


# ---------------------------------------------------------------------------------------------------------- code blocks


@pytest.mark.parametrize("path", [p for p in PAGES[1:] if fences(p, "python")], ids=name_of)
def test_python_blocks_run(path, inside):
    """In their order, in one namespace, as one who reads the page from the top would paste them."""
    names = {"__name__": "__main__"}
    for line, text in fences(path, "python"):
        exec(compile("\n" * line + text, str(path), "exec"), names)


def test_the_code_of_the_readme_gives_a_good_result(inside):
    """It is to be pasted: the rates and steps in it teach the model what the rows say."""
    names = {"__name__": "__main__"}
    ((_, text),) = fences(ROOT / "README.md", "python")
    exec(text, names)
    rows = tiny.byte_tokenizer()(["red green blue? aaaa", "red black blue? aaaa"], return_tensors="pt")
    labels = rows["input_ids"].clone()
    labels[:, :-5] = -100  # the completion, of one token a byte
    losses = []
    for adapted in (False, True):
        with torch.no_grad(), contextlib.nullcontext() if adapted else names["model"].disable_adapter():
            losses.append(float(names["model"](**rows, labels=labels).loss))
    assert losses[1] < losses[0] / 10, losses


@pytest.mark.parametrize("path", [p for p in PAGES if fences(p, "bash")], ids=name_of)
def test_bash_blocks_run(path, inside, capfd):
    for text in [text for _, text in fences(path, "bash")]:
        for line in filter(None, (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())):
            while "=" in line[0]:
                line = line[1:]  # a variable of the environment
            program, words = Path(line[0]).name, line[1:]
            told = " ".join([program, *words])
            if program == "make":
                assert words and re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), told
            elif program == "pip":
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                wanted = re.findall(r"\[([\w,]+)\]", told)
                assert {e for part in wanted for e in part.split(",")} <= {*extras}, told
            elif any(told.startswith(prefix) for prefix in NOT_RUN):
                parsed(words)
            elif program == "ctsft":
                again = ["--overwrite"] if words[0] == "tune" else []  # the folder has a run of that name
                code = command([*(STAND_IN.get(word, word) for word in words), *again])
                assert not code, f"{told}: {capfd.readouterr().err}"
            else:
                pytest.fail(f"{path}: {told!r} is neither run nor listed in NOT_RUN")


def test_the_experiment_and_the_claim_of_the_page_are_right(tmp_path):
    """What the page on the laboratory shows is read as an experiment and as a claim on it."""
    (_, experiment), (_, claim) = fences(ROOT / "docs" / "laboratory.md", "toml")
    shutil.copy(PAPERS / "defaults.toml", tmp_path)
    (tmp_path / "batch.toml").write_text(experiment)
    (tmp_path / "claims.toml").write_text(claim)
    laboratory = read_laboratory(tmp_path)
    assert [arm.spec.batch for arm in arms(laboratory, "batch")] == [2, 4, 8]
    (verdict,) = judge(read_claims(tmp_path / "claims.toml"), laboratory, Records(tmp_path / "none"))
    assert verdict.verdict == "not run"


def test_what_is_not_run_is_somewhere():
    every = "\n".join(text for path in PAGES for _, text in fences(path, "bash"))
    assert [prefix for prefix in NOT_RUN if prefix not in every] == []


# ------------------------------------------------------------------------------------------------------ names and links


def test_readme_is_short():
    words = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert words <= WORDS, f"README.md has {words} words; move some to docs/"


@pytest.mark.parametrize("name", generate.PAGES)
def test_made_pages_are_what_the_code_says(name):
    wanted = generate.PAGES[name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == wanted, f"docs/{name} is stale; run: make docs"


def test_every_command_and_option_is_documented():
    """Read off the page itself, not off what makes it."""
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (ctsft [\w -]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == {name for name, _ in generate.commands()}
    for name, found in generate.commands():
        for option in (o for p in found.params if p.param_type_name == "option" for o in p.opts):
            assert f"`{option}`" in sections[name], f"{name} {option}"


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_options_in_the_text_exist(path):
    known = {o for _, found in generate.commands() for p in found.params for o in [*p.opts, *p.secondary_opts]}
    known |= {"--help", "--only"}  # of benchmarks/run.py
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`[^`\n]*?(--[a-z][\w-]*)", text)) <= known


def test_every_file_is_in_the_map_and_the_map_names_no_other():
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+\.py)` \| (.+) \|$", page, re.MULTILINE)
    there = [p for folder in ("src", *generate.FOLDERS) for p in (ROOT / folder).glob("**/*.py")]
    there = [p for p in there if p.name != "__init__.py" or p.parent.parent.name == "src"]  # a room's only names it
    assert sorted(name for name, _ in rows) == sorted(name_of(p) for p in there)


def test_the_rooms_import_what_the_page_says():
    """Every room of the package, from the top, and which others its files import."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| ?(.*) ?\|$", page, re.MULTILINE)
    told = {room: {*re.findall(r"`(\w+)`", imports)} for room, imports in rows}
    (small,) = re.findall(r"^\| small files: (.*?) \|", page, re.MULTILINE)
    there = {}
    for path in (ROOT / "src" / "ctsft").glob("**/*.py"):
        room = path.relative_to(ROOT / "src" / "ctsft").parts[0].removesuffix(".py")
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        modules = [n.module for n in nodes if isinstance(n, ast.ImportFrom) and str(n.module).startswith("ctsft.")]
        there.setdefault(room, set()).update(module.split(".")[1] for module in modules)
    common = {*re.findall(r"`(\w+)`", small)}
    assert common < {*there}
    assert told == {r: found - common - {r} for r, found in there.items() if r not in (*common, "__init__")}
    order = list(told)
    assert all(order.index(room) < order.index(other) for room, imports in told.items() for other in imports)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_paths_in_the_text_exist(path):
    """`src/...` and the like, in backticks, are files or folders of the repository."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"`((?:src|docs|tests|benchmarks|scripts|examples|records|packages)/[\w./-]*)`", text)
    assert [name for name in found if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[\w-]+)?\)", text):
        assert (path.parent / target).exists(), target


def test_every_verdict_and_predicate_is_explained():
    page = (ROOT / "docs" / "laboratory.md").read_text(encoding="utf-8")
    rows = "\n".join(re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE))
    assert {*VERDICTS} <= {*rows.splitlines()}
    assert {*ARGUMENTS} <= {*re.findall(r"`(\w+)`", rows)}


def test_public_names_are_in_the_reference():
    import ctsft

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [n for n in ctsft.__all__ if not re.search(rf"^\.\. auto\w+:: {n}\b", page, re.MULTILINE)] == []


def test_every_page_is_in_the_menu():
    menu = "\n".join(text for _, text in fences(ROOT / "docs" / "index.md", "{toctree}"))
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == {line.strip() for line in menu.splitlines() if re.fullmatch(r"[\w-]+", line.strip())} & pages


def test_the_site_builds_without_a_warning(tmp_path):
    """`make docs`: the API reference from the docstrings, and every link between pages."""
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "trees", "docs", tmp_path]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "ctsft.calibrate" in (tmp_path / "api.html").read_text(encoding="utf-8")


def test_docs_and_examples_have_docstrings():
    for folder in ("docs", "examples"):
        for path in (ROOT / folder).glob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
