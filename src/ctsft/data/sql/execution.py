"""Execution accuracy: a prediction is scored by what it returns, not by how it is spelled. Every example has its own
small database (Zhong, Xiong and Socher 2017, arXiv:1709.00103).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ctsft.data.sql.query import MAX_ROWS, Answer
from ctsft.data.sql.worker import WORKER
from ctsft.errors import CTError

TIME_LIMIT = 1.0  # seconds of the processor


@dataclass(frozen=True)
class Example:
    """One question: `prompt` (tables and question), `completion` (the SQL on one line, ending in ";"), the name of the
    `schema`, the `ddl` script that makes and fills its tables, and the `kind` of question, one of `questions.KINDS`."""

    prompt: str
    completion: str
    schema: str
    ddl: str
    kind: str


def _equal(a: Answer, b: Answer) -> bool:
    def one(x: Any, y: Any) -> bool:
        if isinstance(x, int | float) and isinstance(y, int | float):
            return math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-9)
        return type(x) is type(y) and x == y

    return len(a) == len(b) and all(map(one, a, b))


def same_answer(a: list[Answer] | None, b: list[Answer], ordered: bool) -> bool:
    if a is None or len(a) != len(b):
        return False
    if ordered:
        return all(map(_equal, a, b))
    left = list(b)
    for row in a:
        match = next((i for i, other in enumerate(left) if _equal(row, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def execution_match(sql: str, example: Example, time_limit: float = TIME_LIMIT) -> bool:
    """Whether `sql` returns what the example's own SQL returns on the example's rows.

    The order of rows counts only where the example's SQL has ORDER BY, the order of columns always; numbers are equal
    within 1e-6 of their size; column names are ignored. Only a single reading statement is run, in a process of its
    own, for `time_limit` seconds of the processor at most and within the limits of `query`; anything else is no match.
    Raises `CTError` where the example's own SQL (not limited in time) fails or returns more than `MAX_ROWS` rows."""
    gold = WORKER.answer(example.ddl, example.completion, math.inf)
    if gold is None:
        raise CTError(f"the example's own SQL fails or returns over {MAX_ROWS} rows; correct it: {example.completion}")
    return same_answer(WORKER.answer(example.ddl, sql, time_limit), gold, "ORDER BY" in example.completion)


_FENCE = re.compile(r"```\w*\n(.*?)(?:```|\Z)", re.DOTALL)
_START = re.compile(r"^[^\S\n]*(?:SELECT\b|WITH\s+\w+\s+AS\b)", re.IGNORECASE | re.MULTILINE)
_TOKEN = re.compile(r"""'[^']*'|"[^"]*"|--[^\n]*|(?P<end>;|\n[ \t]*\n)|.""", re.DOTALL)


def extract_sql(text: str) -> str:
    """The first SQL statement of a generated text: inside a code fence if there is one, from the first line that starts
    a query, to the first ";" outside quotes (kept) or the first blank line."""
    if fence := _FENCE.search(text):
        text = fence[1]
    if start := _START.search(text):
        text = text[start.start() :]
    text = text.strip()
    for token in _TOKEN.finditer(text):
        if token["end"]:
            return text[: token.start()] + token["end"].strip()
    return text


def execution_accuracy(predictions: Sequence[str], examples: Sequence[Example]) -> float:
    """The fraction, 0 to 1, of generated texts whose first SQL statement matches its example (`execution_match`).
    Raises `CTError` when the two lists differ in length or are empty."""
    if len(predictions) != len(examples) or not examples:
        raise CTError(
            f"{len(predictions)} predictions for {len(examples)} examples; give one for each, and at least one."
        )
    hits = sum(execution_match(extract_sql(text), example) for text, example in zip(predictions, examples, strict=True))
    return hits / len(examples)
