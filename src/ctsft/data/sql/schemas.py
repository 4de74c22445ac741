"""Small databases: two tables of a domain, drawn with their columns and rows."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ctsft.data.sql.words import ADJECTIVE, FIRM, FIRST, LAST, MAKER, NOUN, PET, POOLS, PREFIX, SUFFIX


class Dice:
    """Draws made of `random()` alone: its sequence is the one that Python promises to keep across versions."""

    def __init__(self, seed: str):
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def pick(self, items: Sequence[Any]) -> Any:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Any], k: int) -> list[Any]:
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(k)]


@dataclass(frozen=True)
class Column:
    name: str
    sigil: str  # ":" label-like text, "=" category, "@" date, "#" count, "$" summable number, "~" measured number
    spec: str
    nullable: bool
    word: str  # what English calls it; the participle of a date

    @property
    def quantity(self) -> str:
        return f"number of {self.word}" if self.sigil == "#" else self.word


@dataclass
class Table:
    name: str
    singular: str
    link: str  # the preposition between child and parent
    columns: list[Column]  # the label first; id and foreign key apart
    header: list[str]
    rows: list[dict[str, Any]]

    @property
    def label(self) -> Column:
        return self.columns[0]

    def draw(self, dice: Dice, sigils: str, nullable: bool | None = False) -> Column:
        """A column of one of these sigils; raises `NoFit` when the table has none. `nullable=None` takes either."""
        fits = [c for c in self.columns[1:] if c.sigil in sigils and nullable in (None, c.nullable)]
        if not fits:
            raise NoFit
        return dice.pick(fits)

    def values(self, column: Column) -> list[Any]:
        return sorted({r[column.name] for r in self.rows} - {None})


class NoFit(Exception):
    """This question cannot be asked of this schema; draw again."""


def _parse_column(dice: Dice, text: str) -> Column:
    match = re.fullmatch(r"(\w+)([:=@#$~]?)(.*?)(\??)", text)
    assert match, text
    word, sigil, spec, null = match.groups()
    name = dice.pick([f"{word}_on", f"{word}_date", f"date_{word}"]) if sigil == "@" else word
    return Column(name, sigil or "=", spec or "|".join(POOLS.get(word, "").split()), bool(null), word)


def _day(dice: Dice) -> str:
    return f"{2015 + dice.below(10)}-{1 + dice.below(12):02d}-{2 + dice.below(27):02d}"


def _text(dice: Dice, pool: str) -> str:
    first, last = dice.pick(FIRST.split()), dice.pick(LAST.split())
    match pool:
        case "person":
            return f"{first} {last}"
        case "work":
            return f"{dice.pick(ADJECTIVE.split())} {dice.pick(NOUN.split())}"
        case "place":
            return dice.pick(PREFIX.split()) + dice.pick(SUFFIX.split())
        case "firm":
            return dice.pick(FIRM.split())
        case "pet":
            return dice.pick(PET.split())
        case "code":
            return "".join(dice.pick("ABCDEFGHKLMNPRSTVXZ") for _ in range(2)) + str(100 + dice.below(900))
        case "street":
            return f"{1 + dice.below(90)} {dice.pick(PREFIX.split())} Street"
        case "phone":
            return f"555-{1000 + dice.below(9000)}"
        case "email":
            return f"{first.lower()}@mail.com"
        case "site":
            return f"{dice.pick(FIRM.split()).lower()}.org"
        case _:
            return f"{dice.pick(MAKER.split())} {dice.pick(pool.split('|'))}"


def _number(dice: Dice, span: str) -> float:
    """A number with the decimals that "low-high" is written with; whole numbers keep three digits."""
    low, high = span.split("-")
    scale = 10 ** len(low.partition(".")[2])
    unit = 10 ** max(0, len(high.partition(".")[0]) - 3) if scale == 1 else 1
    first, last = round(float(low) * scale) // unit, round(float(high) * scale) // unit
    ticks = (first + dice.below(last - first + 1)) * unit
    return ticks / scale if scale > 1 else ticks


def _fill(dice: Dice, column: Column, n: int) -> list[Any]:
    """n values of a column: repeated in a category, otherwise all different, so that no order has a tie."""
    values: list[Any]
    if column.sigil == "=":
        options = column.spec.split("|")
        values = dice.sample([options[i % min(len(options), 5)] for i in range(n)], n)
        values = [v if dice.below(3) else dice.pick(options) for v in values]
    else:
        different: dict[Any, None] = {}
        while len(different) < n:
            if column.sigil == ":":
                value: Any = _text(dice, column.spec)
            else:
                value = _day(dice) if column.sigil == "@" else _number(dice, column.spec)
            different[value] = None
        values = list(different)
    if column.nullable:
        for i in dice.sample(range(n), 2 + dice.below(3)):
            values[i] = None
    return values


def make_table(dice: Dice, line: str, parent: Table | None) -> Table:
    """One table with its label, a draw of its other columns, and 8 to 15 rows."""
    words = line.split()
    start = 2 if parent is None else 3
    columns = [_parse_column(dice, w) for w in words[start:]]
    keep = min(len(columns) - 1, (2 if parent is None else 3) + dice.below(2))
    columns = columns[:1] + dice.sample(columns[1:], keep)
    n = 8 + dice.below(3) if parent is None else 11 + dice.below(5)
    filled = {c.name: _fill(dice, c, n) for c in columns}
    header = ["id", *filled]
    if parent is not None:
        key = f"{parent.singular}_id"
        m = len(parent.rows)
        used = dice.sample(range(1, m + 1), m - dice.pick([0, 0, 1, 2]))
        filled[key] = dice.sample(used + [dice.pick(used) for _ in range(n - len(used))], n)
        header.insert(dice.pick([1, 2, len(header)]), key)
    rows = [{"id": i + 1} | {name: values[i] for name, values in filled.items()} for i in range(n)]
    return Table(words[0], words[1], words[2] if parent else "", columns, header, rows)


def literal(value: Any) -> str:
    if value is None:
        return "NULL"
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def ddl_of(tables: Sequence[Table]) -> str:
    lines = []
    for t in tables:
        types = {"id": "INTEGER PRIMARY KEY"}
        for c in t.columns:
            number = "REAL" if "." in c.spec else "INTEGER"
            types[c.name] = {":": "TEXT", "=": "TEXT", "@": "DATE"}.get(c.sigil, number)
        columns = ", ".join(f"{name} {types.get(name, 'INTEGER')}" for name in t.header)
        rows = ", ".join("(" + ", ".join(literal(row[name]) for name in t.header) + ")" for row in t.rows)
        lines += [f"CREATE TABLE {t.name} ({columns});", f"INSERT INTO {t.name} VALUES {rows};"]
    return "\n".join(lines)
