"""The folder of a run: whose it is, who is at work in it, and what the run there was started from."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from filelock import FileLock, Timeout
from pydantic import ValidationError

from ctsft.errors import CTError
from ctsft.files import read_json, write_json
from ctsft.tune.recipe import FIELDS, Recipe, read_recipe
from ctsft.tune.record import Part, Sources
from ctsft.tune.trainer import BEST, COMPLETE

P = TypeVar("P", bound=Part)
LOCK = ".lock"
MARKS = ("recipe.json",)  # in the folder of a run
# Besides adapter/ and checkpoints/; a plan is there where it chose K.
FILES = ("run.json", "report.html", "plan.json", "plan.html", "before.json", "sources.json", "recipe.json")
# What a killed run can leave: the scratch folder of `save_adapter` and the scratch files of `files.replacing`.
SCRATCH = re.compile(rf"\.adapter-[a-z0-9_]{{8}}|\.({'|'.join(map(re.escape, (*FILES, BEST)))})-[0-9a-f]{{32}}")


# ---- who is at work


def is_foreign(out: Path, marks: Iterable[str] = MARKS) -> bool:
    """Whether `out` is there and is neither empty nor ours, by a file called as one of `marks`; hidden files do not
    count."""
    if not out.exists() or any((out / mark).exists() for mark in marks):
        return False
    return not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())


@contextmanager
def locked(out: Path, marks: Iterable[str] = MARKS) -> Iterator[None]:
    """Hold `out`, made if need be, until the block ends; CTError at once where another process holds it.

    A process that ends, however it ends, holds nothing. What was made for the lock alone goes with it. A folder that is
    not ours (see `is_foreign`) is left as it is.
    """
    if is_foreign(out, marks):
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        try:
            lock.acquire()
        except Timeout:
            raise CTError(f"another process is at work in {out}; wait for it, or give another --out.") from None
        try:
            yield
        finally:
            with suppress(OSError):
                (out / LOCK).unlink()  # while it is held: who opened it just now finds it gone
            lock.release()
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()  # where nothing else was put into it


# ---- whose it is


def check_folder(recipe: Recipe, out: Path, resume: bool, overwrite: bool) -> None:
    """CTError where `out` holds another run, a finished one, none to resume, or something that is not ours."""
    known, finished = out / "recipe.json", (out / "run.json").exists()
    if known.exists():
        old = read_recipe(known)
        if resume and finished:
            raise CTError(f"the run in {out} is finished; its report is {out / 'report.html'}.")
        if resume:
            check_recipe(old, out)
        if resume and old != recipe:
            wrong = [n for n in FIELDS if getattr(old, n) != getattr(recipe, n)]
            raise CTError(f"the run in {out} was started with other {', '.join(wrong)}; resume it without giving them.")
        if not resume and not overwrite:
            state, choices = (
                ("finished", "replace") if finished else ("unfinished", "continue it with --resume, replace")
            )
            raise CTError(f"{out} holds a run that is {state}; {choices} it with --overwrite, or give another --out.")
    elif resume:
        raise CTError(f"{out} holds no run to resume; start one without --resume.")
    elif is_foreign(out):
        raise CTError(f"{out} exists and is no run of ctsft; give another --out.")


def claim_folder(recipe: Recipe, sources: Sources, out: Path) -> None:
    """Make `out` the folder of a new run. Of a run before it only what a run itself writes is removed, nothing else."""
    for name in FILES[:-1]:  # run.json first: what remains is an unfinished run
        (out / name).unlink(missing_ok=True)
    for mark in (out / "checkpoints").glob(f"checkpoint-*/{COMPLETE}"):
        mark.unlink()
    for name in ("checkpoints", "adapter"):
        if (out / name).exists():
            shutil.rmtree(out / name)
    write_json(out / "recipe.json", recipe.values())
    write_sealed(out / "sources.json", sources)


def sweep(out: Path, scratch: re.Pattern[str] = SCRATCH) -> None:
    """Remove the scratch that killed runs left in `out`; nothing that has another name."""
    for path in [*out.glob(".*"), *(out / "checkpoints").glob(".*")]:
        if scratch.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---- what it was started from


def hashed(values: Iterable[Any]) -> str:
    """A 128-bit hash (xxh3) of JSON values, one after the other."""
    total = xxhash.xxh3_128()
    for value in values:
        total.update(json.dumps(value).encode() + b"\n")
    return f"xxh3-{total.hexdigest()}"


def write_sealed(path: Path, part: Part) -> None:
    """Write the fields of `part` as JSON, with a hash of them by which `read_sealed` knows that they are unchanged."""
    values = part.model_dump()
    write_json(path, {"hash": hashed([values])} | values)


def read_sealed(path: Path, kind: type[P]) -> P:
    """What `write_sealed` wrote to `path`; CTError where it is damaged."""
    values = read_json(path)
    seal = values.pop("hash", None) if isinstance(values, dict) else None
    with suppress(ValidationError):
        if seal == hashed([values]):
            return kind.model_validate(values)
    raise CTError(f"{path} is not as it was written; it is damaged.")


def read_sources(out: Path) -> Sources:
    """What the run in `out` was started from; CTError where its file is damaged."""
    path = out / "sources.json"
    try:
        return read_sealed(path, Sources)
    except CTError:
        raise CTError(
            f"{path} is damaged, so nobody knows whether data and weights are as they were; delete it to resume all "
            "the same, or start anew with --overwrite."
        ) from None


def check_recipe(recipe: Recipe, out: Path) -> None:
    """CTError where `recipe`, the content of recipe.json, is not what the run in `out` was started with."""
    if (out / "sources.json").exists() and read_sources(out).recipe != hashed([recipe.values()]):
        raise CTError(
            f"{out / 'recipe.json'} was changed or damaged since the run was started; put it back, or start anew with "
            "--overwrite."
        )


def check_sources(now: Sources, model: str, data: str, out: Path, tell: Callable[[str], None]) -> None:
    """CTError where data or weights are not `now` what the run in `out` was started from; it says which.

    model, data: what they are called.

    Where the run does not know, because it was killed before or its file was deleted, it goes by `now` from here on,
    and `tell` gets a sentence if anything was measured already.
    """
    if not (out / "sources.json").exists():
        if (out / "before.json").exists():
            tell(f"{out} does not tell from which data and weights the run was started; they are taken to be the same.")
        write_sealed(out / "sources.json", now)
        return
    old = read_sources(out)
    changed = []
    if old.data != now.data:
        changed.append(f"rows in {data}")
    elif old.tokens != now.tokens:
        changed.append(f"tokens of {data} (the tokenizer or its chat template changed)")
    if old.weights != now.weights:
        changed.append(f"weights in {model}")
    if old.directions != now.directions:
        changed.append("directions in the file that they are read from")
    if changed:
        raise CTError(
            f"the run in {out} was started with other {' and other '.join(changed)}; put back what changed, or start "
            "anew with --overwrite."
        )
