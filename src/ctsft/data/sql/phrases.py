"""Parts of a question in English, each with the part of SQL that says the same."""

import math
from collections.abc import Sequence
from typing import Any

from ctsft.data.sql.schemas import Dice, NoFit, Table, literal
from ctsft.data.sql.words import MONTHS


def plural(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def quoted(dice: Dice, value: str) -> str:
    return dice.pick([value, value, f'"{value}"'])


def _spoken_date(dice: Dice, iso: str) -> str:
    year, month, day = iso.split("-")
    return dice.pick([iso, iso, f"{MONTHS.split()[int(month) - 1]} {int(day)}, {year}"])


def _round_between(low: float, high: float) -> float:
    """The roundest number strictly between the two (whole between whole numbers), or `low` where there is none."""
    whole = isinstance(low, int) and isinstance(high, int)
    for step in (1000, 500, 100, 50, 10, 5, 1) if whole else (100, 50, 10, 5, 1, 0.5, 0.1, 0.05):
        value = round((math.floor(low / step + 1e-9) + 1) * step, 2)
        if low < value < high:
            return int(value) if value == int(value) else value
    return low


def is_value(dice: Dice, t: Table, q: str = "") -> tuple[str, str]:
    c = t.draw(dice, "=")
    value = dice.pick(t.values(c))
    v = quoted(dice, value)
    phrases = [f"whose {c.word} is {v}", f"with {c.word} {v}", f"where the {c.word} is {v}"]
    if c.word in ("country", "city"):
        phrases += [f"{'from' if c.word == 'country' else 'in'} {v}"] * 3
    if dice.below(6) == 0:
        other = dice.pick(t.values(c))
        if other == value:
            raise NoFit
        two = f"{v} or {quoted(dice, other)}"
        return f"whose {c.word} is {two}", f"{q}{c.name} IN ({literal(value)}, {literal(other)})"
    return dice.pick(phrases), f"{q}{c.name} = {literal(value)}"


def compares(dice: Dice, t: Table, q: str = "") -> tuple[str, str]:
    c = t.draw(dice, "#$~", None)
    values = t.values(c)
    i = 1 + dice.below(len(values) - 2)
    sign = dice.pick([">", ">", "<", "<", ">=", "<=", "BETWEEN"])
    v: Any = values[i]
    if sign == "BETWEEN":
        j = min(len(values) - 2, i + dice.below(4))
        low, high = _round_between(values[i - 1], v), _round_between(values[j], values[j + 1])
        span = f"between {low} and {high}"
        phrase = f"with {span} {c.word}" if c.sigil == "#" else f"with {_a(c.word)} {span}"
        return phrase, f"{q}{c.name} {span.upper()}"
    if sign == ">":
        v = _round_between(values[i - 1], values[i])
    elif sign == "<":
        v = _round_between(values[i], values[i + 1])
        v = values[i + 1] if v == values[i] else v
    count, measure = {
        ">": (["more than", "over"], ["above", "over", "greater than", "higher than"]),
        "<": (["fewer than", "less than"], ["below", "under", "less than", "lower than"]),
        ">=": (["at least"], ["of at least"]),
        "<=": (["at most"], ["of at most", "of no more than"]),
    }[sign]
    if c.sigil == "#":
        phrase = f"with {dice.pick(count)} {v} {c.word}"
    else:
        how = dice.pick(measure)
        of = how.removeprefix("of ")
        phrase = dice.pick([f"with {_a(c.word)} {how} {v}", f"whose {c.word} is {of} {v}"])
    return phrase, f"{q}{c.name} {sign} {v}"


def dated(dice: Dice, t: Table, q: str = "") -> tuple[str, str]:
    c = t.draw(dice, "@", None)
    values = t.values(c)
    year, month, _ = dice.pick(values[1:-1]).split("-")
    shape = dice.pick(["before", "after", "before", "after", "year", "year", "month"])
    if shape == "year":
        phrase = dice.pick([f"{c.word} in {year}", f"{c.word} during {year}", f"{c.word} in the year {year}"])
        return phrase, f"{q}{c.name} LIKE '{year}-%'"
    if shape == "month":
        return f"{c.word} in {MONTHS.split()[int(month) - 1]} {year}", f"{q}{c.name} LIKE '{year}-{month}-%'"
    day = f"{year}-{month}-01"
    sign = "<" if shape == "before" else ">"
    return f"{c.word} {shape} {_spoken_date(dice, day)}", f"{q}{c.name} {sign} '{day}'"


def missing(dice: Dice, t: Table, q: str = "") -> tuple[str, str]:
    c = t.draw(dice, ":=@$~", True)
    have = dice.below(4) == 0
    if c.sigil == "@":
        phrases = [f"already {c.word}"] if have else [f"not yet {c.word}", f"not {c.word} yet", f"still not {c.word}"]
    elif have:
        phrases = [f"with a known {c.word}", f"whose {c.word} is known", f"whose {c.word} is not missing"]
    else:
        phrases = [f"with no {c.word}", f"with no known {c.word}", f"without {_a(c.word)}"]
        phrases += [
            f"{whose} {c.word} is {gone}" for whose in ("whose", "where the") for gone in ("missing", "unknown")
        ]
    return dice.pick(phrases), f"{q}{c.name} IS {'NOT ' if have else ''}NULL"


def is_not(dice: Dice, t: Table, q: str = "") -> tuple[str, str]:
    c = t.draw(dice, "=")
    value = dice.pick(t.values(c))
    v = quoted(dice, value)
    phrases = [
        f"whose {c.word} is not {v}",
        f"with {_a(c.word)} other than {v}",
        f"where the {c.word} is anything but {v}",
    ]
    if c.word in ("country", "city"):
        phrases += [f"not {'from' if c.word == 'country' else 'in'} {v}"] * 3
    return dice.pick(phrases), f"{q}{c.name} <> {literal(value)}"


def condition(dice: Dice, t: Table, q: str = "") -> tuple[str, str]:
    """What follows the noun, and its WHERE; `q` qualifies the columns ("books.")."""
    first = dice.pick([is_value, compares])(dice, t, q)
    if dice.below(6) or " IN " in first[1]:
        return first
    second = dice.pick([compares, dated])(dice, t, q)
    if first[1].split()[0] == second[1].split()[0]:
        return first
    return f"{first[0]} and {second[0]}", f"{first[1]} AND {second[1]}"


def ask_for(dice: Dice, words: Sequence[str], t: Table, phrase: str) -> str:
    """A request for these columns of some rows of a table."""
    one, many = " and ".join(words), " and ".join(plural(w) for w in words)
    return dice.pick(
        [
            f"List the {many} of {t.name} {phrase}.",
            f"Show me the {many} of all {t.name} {phrase}.",
            f"What are the {many} of the {t.name} {phrase}?",
            f"Give the {one} of every {t.singular} {phrase}.",
            f"Find the {many} of {t.name} {phrase}.",
            f"Return the {one} of each {t.singular} {phrase}.",
            f"Can you list the {many} of {t.name} {phrase}?",
            f"I need the {many} of the {t.name} {phrase}.",
            f"Please show the {many} of {t.name} {phrase}.",
            f"Tell me the {one} of every {t.singular} {phrase}.",
        ]
    )


def ask_count(dice: Dice, t: Table, phrase: str) -> str:
    return dice.pick(
        [
            f"How many {t.name} are there {phrase}?",
            f"How many {t.name} {phrase} are there?",
            f"Count the {t.name} {phrase}.",
            f"What is the number of {t.name} {phrase}?",
            f"Give me the number of {t.name} {phrase}.",
            f"Find how many {t.name} there are {phrase}.",
        ]
    )


def ask_number(dice: Dice, what: str, rows: str) -> str:
    return dice.pick(
        [
            f"What is the {what} of {rows}?",
            f"Find the {what} of all {rows}.",
            f"Show the {what} of the {rows}.",
            f"Compute the {what} of {rows}.",
            f"I want to know the {what} of {rows}.",
        ]
    )


def aggregate_of(dice: Dice, t: Table, q: str = "") -> tuple[str, str]:
    """An aggregate in English and in SQL; only what adds up is summed."""
    function = dice.pick(["AVG", "AVG", "MAX", "MIN", "SUM"])
    c = t.draw(dice, "#$" if function == "SUM" else "#$~", None)
    adjectives = {
        "AVG": ["average", "mean"],
        "MAX": ["highest", "maximum"],
        "MIN": ["lowest", "minimum"],
        "SUM": ["total", "combined"],
    }
    return f"{dice.pick(adjectives[function])} {c.quantity}", f"{function}({q}{c.name})"


def superlative(dice: Dice, t: Table, noun: str, q: str = "") -> tuple[str, str]:
    """The noun with its superlative ("book with the highest price") and the ORDER BY that goes with it."""
    c = t.draw(dice, "#$~@")
    down = dice.below(3) > 0
    if c.sigil == "@":
        english = f"{'most recently' if down else 'earliest'} {c.word} {noun}"
    elif c.sigil == "#":
        english = f"{noun} with the {'most' if down else 'fewest'} {c.word}"
    else:
        english = f"{noun} with the {'highest' if down else 'lowest'} {c.word}"
    return english, f"{q}{c.name} {'DESC' if down else 'ASC'}"
