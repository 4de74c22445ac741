"""Examples of the data set `sql`, drawn by a seed. The held-out domains share no table name with the training domains.

An example is kept only where its rows can tell right from wrong: the answer is not empty, holds no NULL, does not hang
on a tie, and changes when a clause is dropped or turned around.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Sequence

from ctsft.data.sql.execution import Example, same_answer
from ctsft.data.sql.query import answer_of, database_of
from ctsft.data.sql.questions import KINDS
from ctsft.data.sql.schemas import Dice, NoFit, Table, ddl_of, make_table
from ctsft.data.sql.words import DOMAINS, Split
from ctsft.errors import CTError

MAX_EXAMPLES = 50_000
MAX_ONE = 2_000  # examples of one database: every one has so many

DATABASES = {d.partition("\n")[0]: d for split in DOMAINS.values() for d in split.strip().split("\n\n")}
WHEEL = [kind for kind, (share, _) in KINDS.items() for _ in range(share)]

_FLIPS = [(" WHERE .*?(?= GROUP| ORDER|;)", ""), (" HAVING .*;", ";"), (r" LIMIT \d+", ""), ("DISTINCT ", "")]
_FLIPS += [("AVG", "SUM"), ("SUM", "AVG"), ("MIN", "MAX"), ("MAX", "MIN"), ("DESC", "ASC"), ("ASC", "DESC")]
_FLIPS += [(" > ", " < "), (" < ", " > "), (" >= ", " < "), (" <= ", " > "), (" <> ", " = "), (" NOT ", " ")]
_FLIPS += [("IS NULL", "IS NOT NULL"), ("LIKE", "NOT LIKE"), (" IN ", " NOT IN "), ("BETWEEN", "NOT BETWEEN")]


def _telling(sql: str, ddl: str) -> bool:
    """Whether the answer on these rows tells the query from its near misses (see the head)."""
    with contextlib.closing(database_of(ddl)) as database:
        answer = answer_of(database, sql, math.inf)
        if not answer or any(value is None for row in answer for value in row):
            return False
        if sql.startswith("SELECT COUNT(*)") and answer[0][0] < 2:
            return False
        for pattern, turned in _FLIPS:
            miss = re.sub(pattern, turned, sql, count=1)
            if miss != sql and same_answer(answer_of(database, miss, math.inf), answer, "ORDER BY" in sql):
                return False
        ties = [re.sub(r"( ORDER BY .*?)( LIMIT|;)", rf"\1, 1 {way}\2", sql) for way in ("ASC", "DESC")]
        return all(same_answer(answer_of(database, tie, math.inf), answer, True) for tie in ties if tie != sql)


def _tables(dice: Dice, domain: str) -> list[Table]:
    """Parent and child of a domain, drawn with their columns and rows."""
    _, *lines = domain.splitlines()
    parent = make_table(dice, lines[0], None)
    return [parent, make_table(dice, lines[1], parent)]


def _example(dice: Dice, name: str, tables: Sequence[Table], kind: str) -> Example | None:
    """A question about these tables, or None where the kind does not fit them or the answer tells too little."""
    try:
        question, sql = KINDS[kind][1](dice, *tables)
    except NoFit:
        return None
    ddl = ddl_of(tables)
    if not _telling(sql, ddl):
        return None
    if question.startswith("What"):  # also where "What is" was drawn as one of several openings
        question = question[:-1] + "?"
    if dice.below(8) == 0:
        question = question[0].lower() + question[1:-1]
    header = ", ".join(f"{t.name}({', '.join(t.header)})" for t in tables)
    return Example(f"Write one SQLite query.\nTables: {header}\nQuestion: {question}\nSQL:", sql, name, ddl, kind)


def generate(n: int, seed: int, split: Split) -> list[Example]:
    """n examples with n different prompts, the same for the same arguments on every machine; a smaller n with the same
    seed gives the beginning of the same list. Raises `CTError` unless 1 <= n <= `MAX_EXAMPLES` and the split exists."""
    if split not in DOMAINS:
        raise CTError(f"split is {split!r}; it must be one of {', '.join(DOMAINS)}.")
    if not 1 <= n <= MAX_EXAMPLES:
        raise CTError(f"n is {n}; ask for 1 to {MAX_EXAMPLES} examples.")
    domains = DOMAINS[split].strip().split("\n\n")
    dice = Dice(f"sql {split} {seed}")
    examples: dict[str, Example] = {}
    while len(examples) < n:
        kind = dice.pick(WHEEL)
        example = None
        while example is None:
            domain = dice.pick(domains)
            example = _example(dice, domain.partition("\n")[0], _tables(dice, domain), kind)
        examples.setdefault(example.prompt, example)
    return list(examples.values())


def generate_one(n: int, seed: int, name: str) -> list[Example]:
    """n examples with n different prompts, all about one database: the one that stands for the domain `name`, the same
    tables, columns and rows for every seed. As `generate` otherwise. Raises `CTError` where there is no such domain, or
    where it has not so many questions."""
    if name not in DATABASES:
        close = difflib.get_close_matches(name, DATABASES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(DATABASES))}."
        raise CTError(f"sql has no database {name!r}: {hint}")
    if not 1 <= n <= MAX_ONE:
        raise CTError(f"n is {n}; ask for 1 to {MAX_ONE} examples of one database.")
    tables = _tables(Dice(f"sql database {name}"), DATABASES[name])
    dice = Dice(f"sql database {name} {seed}")
    examples: dict[str, Example] = {}
    while len(examples) < n:
        if example := _example(dice, name, tables, dice.pick(WHEEL)):
            examples.setdefault(example.prompt, example)
    return list(examples.values())
