"""The twelve kinds of question: each draws a question about two tables and the SQL that answers it."""

from collections.abc import Callable

from ctsft.data.sql.phrases import (
    aggregate_of,
    ask_count,
    ask_for,
    ask_number,
    compares,
    condition,
    dated,
    is_not,
    is_value,
    missing,
    plural,
    quoted,
    superlative,
)
from ctsft.data.sql.schemas import Dice, NoFit, Table, literal

Asked = tuple[str, str]  # question, SQL


def _rows(dice: Dice, t: Table, phrase: str, where: str) -> Asked:
    columns = [t.label]
    if dice.below(4) == 0 and (other := t.draw(dice, "=$~")).name not in where:
        columns.append(other)
    names = ", ".join(c.name for c in columns)
    return ask_for(dice, [c.word for c in columns], t, phrase), f"SELECT {names} FROM {t.name} WHERE {where};"


def _rows_or_count(dice: Dice, t: Table, phrase: str, where: str) -> Asked:
    if dice.below(3):
        return _rows(dice, t, phrase, where)
    return ask_count(dice, t, phrase), f"SELECT COUNT(*) FROM {t.name} WHERE {where};"


def _lookup(dice: Dice, parent: Table, child: Table) -> Asked:
    t = dice.pick([parent, child])
    c = t.draw(dice, ":=@#$~", None)
    value = dice.pick(t.values(t.label))
    row = f"the {t.singular} {quoted(dice, value)}"
    sql = f"SELECT {c.name} FROM {t.name} WHERE {t.label.name} = {literal(value)};"
    if c.sigil == "@":
        return dice.pick([f"When was {row} {c.word}?", f"On which date was {row} {c.word}?"]), sql
    if c.sigil == "#" and dice.below(2):
        return f"How many {c.word} does {row} have?", sql
    return f"{dice.pick(['What is', 'Show', 'Find', 'Tell me'])} the {c.quantity} of {row}.", sql


def _filter(dice: Dice, parent: Table, child: Table) -> Asked:
    t = dice.pick([parent, child])
    return _rows(dice, t, *condition(dice, t))


def _count(dice: Dice, parent: Table, child: Table) -> Asked:
    t = dice.pick([parent, child])
    if dice.below(12) == 0:
        return dice.pick([f"How many {t.name} are there?", f"Count all {t.name}."]), f"SELECT COUNT(*) FROM {t.name};"
    phrase, where = condition(dice, t)
    return ask_count(dice, t, phrase), f"SELECT COUNT(*) FROM {t.name} WHERE {where};"


def _aggregate(dice: Dice, parent: Table, child: Table) -> Asked:
    t = dice.pick([parent, child])
    what, call = aggregate_of(dice, t)
    if dice.below(2):
        return ask_number(dice, what, t.name), f"SELECT {call} FROM {t.name};"
    phrase, where = dice.pick([is_value, is_value, compares, dated])(dice, t)
    if where.split()[0] in call:
        raise NoFit
    return ask_number(dice, what, f"{t.name} {phrase}"), f"SELECT {call} FROM {t.name} WHERE {where};"


def _distinct(dice: Dice, parent: Table, child: Table) -> Asked:
    t = dice.pick([parent, child])
    c = t.draw(dice, "=")
    many = plural(c.word)
    if dice.below(2):
        ask = [
            f"How many different {many} are there among the {t.name}?",
            f"Count the distinct {many} of {t.name}.",
            f"What is the number of different {many} of {t.name}?",
        ]
        return dice.pick(ask), f"SELECT COUNT(DISTINCT {c.name}) FROM {t.name};"
    ask = [
        f"List the different {many} of {t.name}.",
        f"What are the distinct {many} of the {t.name}?",
        f"Show every {c.word} that occurs among the {t.name}, without repeats.",
        f"Which different {many} do the {t.name} have?",
    ]
    return dice.pick(ask), f"SELECT DISTINCT {c.name} FROM {t.name};"


def _order(dice: Dice, parent: Table, child: Table) -> Asked:
    t = dice.pick([parent, child])
    label, many = t.label.word, plural(t.label.word)
    head = f"SELECT {t.label.name} FROM {t.name} ORDER BY"
    shape = dice.below(3)
    if shape == 0:
        row, order = superlative(dice, t, t.singular)
        return (
            f"{dice.pick(['What is', 'Find', 'Give me', 'Show'])} the {label} of the {row}.",
            f"{head} {order} LIMIT 1;",
        )
    if shape == 1:
        n = 2 + dice.below(4)
        noun = f"{dice.pick([n, ('two', 'three', 'four', 'five')[n - 2]])}"
        rows, order = superlative(dice, t, t.name)
        verb = dice.pick(["What are", "List", "Give me", "Show me"])
        return f"{verb} the {many} of the {noun} {rows}.", f"{head} {order} LIMIT {n};"
    c = t.draw(dice, "#$~@")
    down = dice.below(2)
    if c.sigil == "@":
        how = f"by the date they were {c.word}, {'newest' if down else 'oldest'} first"
    else:
        ways = ["highest first", "from highest to lowest", "in descending order"]
        ways = ways if down else ["lowest first", "from lowest to highest", "in ascending order"]
        how = f"by {c.quantity}, {dice.pick(ways)}"
    ask = [
        f"List the {many} of all {t.name} sorted {how}.",
        f"Show the {many} of the {t.name}, ordered {how}.",
        f"Sort the {t.name} {how}, and give their {many}.",
    ]
    return dice.pick(ask), f"{head} {c.name} {'DESC' if down else 'ASC'};"


def _group(dice: Dice, parent: Table, child: Table) -> Asked:
    t = dice.pick([parent, child])
    c = t.draw(dice, "=")
    by = f"FROM {t.name} GROUP BY {c.name}"
    shape = dice.below(4)
    if shape == 0:
        ask = [
            f"How many {t.name} are there for each {c.word}?",
            f"For each {c.word}, show the number of {t.name}.",
            f"Show every {c.word} with its number of {t.name}.",
            f"Count the {t.name} per {c.word}, giving the {c.word} and the count.",
        ]
        return dice.pick(ask), f"SELECT {c.name}, COUNT(*) {by};"
    if shape == 1:
        what, call = aggregate_of(dice, t)
        ask = [
            f"What is the {what} of {t.name} for each {c.word}?",
            f"For each {c.word}, show the {what} of its {t.name}.",
            f"Show every {c.word} with the {what} of its {t.name}.",
            f"Give the {c.word} and the {what} of {t.name} per {c.word}.",
        ]
        return dice.pick(ask), f"SELECT {c.name}, {call} {by};"
    if shape == 2:
        n = 1 + dice.below(4)
        than = f"more than {n} {t.name}" if n > 1 else f"more than one {t.singular}"
        ask = [f"Which {plural(c.word)} have {than}?", f"List each {c.word} with {than}."]
        return dice.pick(ask), f"SELECT {c.name} {by} HAVING COUNT(*) > {n};"
    most, order = dice.pick([("most", "DESC"), ("most", "DESC"), ("fewest", "ASC")])
    ask = [f"Which {c.word} has the {most} {t.name}?", f"Find the {c.word} with the {most} {t.name}."]
    return dice.pick(ask), f"SELECT {c.name} {by} ORDER BY COUNT(*) {order} LIMIT 1;"


def _date(dice: Dice, parent: Table, child: Table) -> Asked:
    t = dice.pick([parent, child])
    if dice.below(6):
        return _rows_or_count(dice, t, *dated(dice, t))
    c = t.draw(dice, "@", None)
    word, function = dice.pick([("first", "MIN"), ("last", "MAX")])
    ask = f"{dice.pick(['When', 'On which date'])} was the {word} {t.singular} {c.word}?"
    return ask, f"SELECT {function}({c.name}) FROM {t.name};"


def _null(dice: Dice, parent: Table, child: Table) -> Asked:
    t = dice.pick([parent, child])
    return _rows_or_count(dice, t, *missing(dice, t))


def _negation(dice: Dice, parent: Table, child: Table) -> Asked:
    if dice.below(3):
        t = dice.pick([parent, child])
        return _rows_or_count(dice, t, *is_not(dice, t))
    phrase = dice.pick([f"without any {child.name}", f"with no {child.name}", f"without a single {child.singular}"])
    return _rows_or_count(dice, parent, phrase, f"id NOT IN (SELECT {parent.singular}_id FROM {child.name})")


def _joined(parent: Table, child: Table) -> str:
    return f"FROM {child.name} JOIN {parent.name} ON {child.name}.{parent.singular}_id = {parent.name}.id"


def _join(dice: Dice, parent: Table, child: Table) -> Asked:
    source = _joined(parent, child)
    label, parent_label = f"{child.name}.{child.label.name}", f"{parent.name}.{parent.label.name}"
    its_parent = f"the {parent.label.word} of the {parent.singular}"
    shape = dice.below(8)
    if shape == 0:
        ask = [
            f"Show the {child.label.word} of each {child.singular} and {its_parent} it belongs to.",
            f"For every {child.singular}, give its {child.label.word} and {its_parent}.",
        ]
        return dice.pick(ask), f"SELECT {label}, {parent_label} {source};"
    if shape == 1:
        value = dice.pick(child.values(child.label))
        row = f"{child.singular} {quoted(dice, value)}"
        return (
            f"{dice.pick(['What is', 'Find'])} {its_parent} of the {row}.",
            f"SELECT {parent_label} {source} WHERE {label} = {literal(value)};",
        )
    if shape == 2:
        row, order = superlative(dice, child, child.singular, f"{child.name}.")
        question = f"{dice.pick(['What is', 'Find'])} {its_parent} of the {row}."
        return question, f"SELECT {parent_label} {source} ORDER BY {order} LIMIT 1;"
    if shape in (3, 4):
        value = dice.pick(parent.values(parent.label))
        phrase = f"{child.link} the {parent.singular} {quoted(dice, value)}"
        where = f"{parent_label} = {literal(value)}"
    else:
        phrase, where = dice.pick([is_value, is_value, compares, dated])(dice, parent, f"{parent.name}.")
        phrase = f"{child.link} {parent.name} {phrase}"
    if shape in (3, 5, 6):
        return ask_for(dice, [child.label.word], child, phrase), f"SELECT {label} {source} WHERE {where};"
    if dice.below(2):
        return ask_count(dice, child, phrase), f"SELECT COUNT(*) {source} WHERE {where};"
    what, call = aggregate_of(dice, child, f"{child.name}.")
    return ask_number(dice, what, f"{child.name} {phrase}"), f"SELECT {call} {source} WHERE {where};"


def _join_group(dice: Dice, parent: Table, child: Table) -> Asked:
    if len({r[f"{parent.singular}_id"] for r in child.rows}) < len(parent.rows):
        raise NoFit  # whether a parent without children is a group of zero would be open
    source = _joined(parent, child)
    c = parent.label
    shape = dice.below(4)
    if shape == 0:
        most, order = dice.pick([("most", "DESC"), ("most", "DESC"), ("fewest", "ASC")])
        key, group = f"{parent.name}.{c.name}", f"{parent.singular} with the {most} {child.name}"
        question = f"{dice.pick(['What is', 'Find'])} the {c.word} of the {group}."
        return question, f"SELECT {key} {source} GROUP BY {key} ORDER BY COUNT(*) {order} LIMIT 1;"
    if shape == 1:
        c = parent.draw(dice, "=")
    key, group = f"{parent.name}.{c.name}", f"{parent.singular} {c.word}"
    what, call = (f"number of {child.name}", "COUNT(*)")
    if dice.below(2):
        what, call = aggregate_of(dice, child, f"{child.name}.")
        what += f" of the {child.name}"
    ask = [
        f"For each {group}, show the {what}.",
        f"What is the {what} for each {group}?",
        f"Show every {group} together with the {what}.",
    ]
    return dice.pick(ask), f"SELECT {key}, {call} {source} GROUP BY {key};"


# Kind of question -> (its share in percent, what asks it). The first five are the easy half.
KINDS: dict[str, tuple[int, Callable[[Dice, Table, Table], Asked]]] = {
    "lookup": (8, _lookup),
    "filter": (16, _filter),
    "count": (12, _count),
    "aggregate": (11, _aggregate),
    "distinct": (5, _distinct),
    "order": (11, _order),
    "group": (9, _group),
    "date": (7, _date),
    "null": (5, _null),
    "negation": (5, _negation),
    "join": (8, _join),
    "join_group": (3, _join_group),
}
