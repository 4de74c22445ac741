"""Files and names to siblings: tasks of one family, each with rows of its own to train on and to hold out."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctsft.data.read import Located
from ctsft.data.rows import Corpus, layouts_for, load_corpus, located_rows, split_rows
from ctsft.data.sql.words import DOMAINS
from ctsft.errors import CTError, shown

FEWEST_ROWS = 8  # of a sibling that is one value of a column


def load_siblings(
    specs: Sequence[str],
    by: str | None = None,
    *,
    seed: int = 0,
    heldout: float | int = 0.1,
    limit: int | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
) -> tuple[dict[str, Corpus], list[str]]:
    """The siblings that `specs` name, by a short name of each, and sentences that a user should see.

    Every spec is a sibling, as `load_corpus` takes it; `sql` stands for all its databases but the held-out ones. With
    `by`, there is one spec, and every value of that column is a sibling but those with fewer than FEWEST_ROWS rows.
    The other options are those of `load_corpus`, for each sibling. Raises CTError as it does, for a name given twice,
    and where `by` finds nothing.
    """
    if by is None:
        whole = [one for spec in specs for one in (databases() if spec == "sql" else [spec])]
        columns = {"prompt_column": prompt_column, "completion_column": completion_column}
        loaded = [load_corpus(spec, seed=seed, heldout=heldout, limit=limit, **columns) for spec in whole]
        return dict(zip(short_names(whole), loaded, strict=True)), []
    if len(specs) != 1 or specs[0].partition(":")[0] == "sql":
        raise CTError("--by makes a sibling of every value of a column, so it takes one file or hub data set.")
    name, located = located_rows(specs[0])
    groups: dict[str, list[Located]] = {}
    for where, raw in located:
        groups.setdefault(value_of(where, raw, by), []).append((where, raw))
    large = {value: rows for value, rows in groups.items() if len(rows) >= FEWEST_ROWS}
    if not large:
        raise CTError(f"no value of {shown(by)} in {name} has {FEWEST_ROWS} rows; choose another column for --by.")
    layouts, split = layouts_for(prompt_column, completion_column), {"seed": seed, "heldout": heldout, "limit": limit}
    siblings = {v: split_rows(f"{name}, {by} {shown(v)}", rows, layouts, **split) for v, rows in large.items()}  # type: ignore[arg-type]
    few = len(groups) - len(large)
    return siblings, [f"{few} values of {by} with fewer than {FEWEST_ROWS} rows are left out"] if few else []


def databases() -> list[str]:
    """The databases of `sql` that may be trained on, as specs of their own."""
    return [f"sql:{domain.partition(chr(10))[0]}" for domain in DOMAINS["train"].strip().split("\n\n")]


def value_of(where: str, raw: Any, by: str) -> str:
    """What stands in the column `by` of a raw row; CTError where that is no text, number or truth."""
    if not isinstance(raw, dict) or by not in raw:
        there = shown(", ".join(map(str, raw))) if isinstance(raw, dict) else "no columns"
        raise CTError(f"{where} has no column {shown(by)} for --by: it has {there or 'none'}.")
    value = raw[by]
    if not isinstance(value, str | int | float) or value == "":
        raise CTError(f"{where} has no text or number in {shown(by)}, so it belongs to no sibling.")
    return str(value)


def short_names(specs: Sequence[str]) -> list[str]:
    """The names of files without folder and ending, where that tells all of them apart; else the specs as they are.

    Raises CTError where one is named twice.
    """
    if twice := [spec for spec, count in Counter(specs).items() if count > 1]:
        raise CTError(f"{shown(twice[0])} is named twice; name every sibling once.")
    short = [Path(spec).name.partition(".")[0] or spec for spec in specs]
    return short if len(set(short)) == len(short) else list(specs)
