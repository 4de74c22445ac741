import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctsft.data.sql.execution import Example, execution_accuracy, execution_match, extract_sql
from ctsft.errors import CTError
from test_sql_examples import ALL, TRAIN

ONE = Example("", "SELECT 1;", "tiny", "CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (1);", "filter")


def misses(pattern, replacement):
    """The examples whose SQL the substitution changes, and how many of the changed queries still score."""
    changed = [(re.sub(pattern, replacement, e.completion, count=1), e) for e in ALL]
    changed = [(bad, e) for bad, e in changed if bad != e.completion]
    return len(changed), sum(execution_match(bad, e) for bad, e in changed)


# ---- execution_match: what must not score


@pytest.mark.parametrize(
    ("pattern", "replacement", "at_least"),
    [
        (r" WHERE .*?(?= GROUP| ORDER|;)", "", 300),
        (r"AVG", "SUM", 50),
        (r"MAX", "MIN", 20),
        (r"SUM", "AVG", 20),
        (r"COUNT\(\*\) FROM", "1 FROM", 80),
        (r"DISTINCT ", "", 20),
        (r" DESC", " ASC", 50),
        (r" LIMIT \d+", "", 50),
        (r" <> ", " = ", 15),
        (r" IS NULL", " IS NOT NULL", 15),
        (r" NOT IN ", " IN ", 10),
        (r" > ", " < ", 50),
        (r" HAVING .*;", ";", 10),
        (r"(?<= = )'(?:[^']|'')*'", "'nothing'", 100),
        (r"FROM \w+", "FROM nowhere", 900),
        (r"SELECT ", "SELECT 1, ", 900),
        (r"SELECT .*? FROM", "SELECT * FROM", 900),
    ],
)
def test_a_wrong_clause_never_scores(pattern, replacement, at_least):
    changed, scored = misses(pattern, replacement)
    assert changed >= at_least and scored == 0


@pytest.mark.parametrize("column", ["COUNT(*)", "*", "id", "name", "NULL", "MAX(id)"])
def test_an_answer_that_ignores_the_question_hardly_ever_scores(column):
    blind = [f"SELECT {column} FROM {re.search('FROM ([a-z]+)', e.completion)[1]};" for e in ALL]
    assert execution_accuracy(blind, ALL) < 0.02


def test_the_answer_to_another_question_hardly_ever_scores():
    by_schema = {e.schema: e for e in ALL}
    assert sum(execution_match(by_schema[e.schema].completion, e) for e in ALL if by_schema[e.schema] != e) < 10


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE t SET a = 1 RETURNING a",
        "INSERT INTO t VALUES (1) RETURNING a",
        "DELETE FROM t RETURNING a",
        "DROP TABLE t",
        "CREATE TABLE u AS SELECT 1",
        "BEGIN",
        "SELECT 1; SELECT 1",
        "SELECT 1; DROP TABLE t",
        "SELECT load_extension('x')",
        "SELECT length(zeroblob(1000000000)) / 1000000000",
        "SELECT ?",
        "SELECT 1\0",
        "SELECT '\ud800'",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT x FROM c",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT x FROM c LIMIT 1",
        "",
        ";",
        "-- SELECT 1",
    ],
)
def test_what_is_not_one_reading_statement_never_scores(sql):
    assert execution_match("SELECT 1", ONE)
    assert not execution_match(sql, ONE)


def test_pragmas_are_refused():
    zero = Example("", "SELECT 0;", "tiny", ONE.ddl, "filter")
    assert execution_match("SELECT 0", zero)
    assert not execution_match("PRAGMA user_version", zero)
    assert not execution_match("PRAGMA query_only", zero)


@pytest.mark.parametrize("sql", ["ATTACH '{}' AS other", "VACUUM INTO '{}'"])
def test_no_file_is_written(tmp_path, sql):
    file = tmp_path / "out.db"
    assert not execution_match(sql.format(file), ONE)
    assert not file.exists()


def test_a_slow_query_is_stopped():
    e = TRAIN[0]
    table = re.search(r"CREATE TABLE (\w+)", e.ddl)[1]
    started = time.monotonic()
    assert not execution_match(f"SELECT COUNT(*) FROM {', '.join(f'{table} AS t{i}' for i in range(14))}", e, 0.1)
    assert 0.1 <= time.monotonic() - started < 2


def test_at_most_a_thousand_rows_are_read():
    ten = "(SELECT 1 AS x" + " UNION ALL SELECT 1" * 9 + ")"
    thousand = Example("", f"SELECT 1 FROM {', '.join([ten] * 3)};", "tiny", ONE.ddl, "filter")
    assert execution_match(thousand.completion, thousand)
    more = f"{thousand.completion.rstrip(';')} UNION ALL SELECT 1;"
    assert not execution_match(more, thousand)
    with pytest.raises(CTError, match="over 1000 rows"):
        execution_match(more, Example("", more, "tiny", ONE.ddl, "filter"))


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(), st.text("SELECT FROMt*;'\"()-`1\n", min_size=1)))
def test_no_text_can_break_the_scoring(text):
    assert execution_accuracy([text], [TRAIN[0]]) == 0.0
    assert execution_match(text, TRAIN[0]) is False


# ---- execution_match: what must score


def test_another_spelling_of_the_same_query_scores():
    for e in ALL[:100]:
        head, _, tail = e.completion.partition(" FROM ")
        names = head.removeprefix("SELECT ")
        assert execution_match(f"select {names}\nfrom {tail.rstrip(';')}", e)


def test_rows_may_come_in_any_order_unless_one_was_asked_for():
    e = Example("", "SELECT a FROM t;", "tiny", ONE.ddl + "INSERT INTO t VALUES (2), (2);", "filter")
    assert execution_match("SELECT a FROM t ORDER BY a DESC", e)
    assert not execution_match("SELECT DISTINCT a FROM t", e)
    assert not execution_match("SELECT 1 UNION ALL SELECT 1 UNION ALL SELECT 2", e)
    ordered = Example("", "SELECT a FROM t ORDER BY a ASC;", "tiny", e.ddl, "order")
    assert execution_match("SELECT a FROM t ORDER BY a", ordered)
    assert not execution_match("SELECT a FROM t ORDER BY a DESC", ordered)


def test_numbers_are_compared_with_a_tolerance_and_text_is_not_a_number():
    third = Example("", "SELECT 1.0 / 3;", "tiny", ONE.ddl, "aggregate")
    assert execution_match("SELECT 0.33333333", third)
    assert not execution_match("SELECT 0.333", third)
    assert execution_match("SELECT 1.0", ONE)
    assert not execution_match("SELECT '1'", ONE)
    assert not execution_match("SELECT NULL", ONE)


def test_an_example_that_does_not_run_is_an_error():
    with pytest.raises(CTError, match="own SQL fails or returns over 1000 rows; correct it: SELECT b FROM t;"):
        execution_match("SELECT 1", Example("", "SELECT b FROM t;", "tiny", ONE.ddl, "filter"))


# ---- extract_sql and execution_accuracy


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("SELECT a FROM t;", "SELECT a FROM t;"),
        ("  SELECT a\nFROM t ; SELECT b;", "SELECT a\nFROM t ;"),
        ("SELECT ';' FROM t; x", "SELECT ';' FROM t;"),
        ("SELECT 'it''s; ok', \"a;b\" FROM t; x", "SELECT 'it''s; ok', \"a;b\" FROM t;"),
        ("SELECT a -- don't; stop\nFROM t; x", "SELECT a -- don't; stop\nFROM t;"),
        ("```sql\nSELECT a FROM t;\n```\nThis query...", "SELECT a FROM t;"),
        ("Sure! Here it is:\n\n```\nSELECT a FROM t\n```", "SELECT a FROM t"),
        ("Here is the query:\nselect a from t;", "select a from t;"),
        ("SELECT a FROM t\n\nThis returns a.", "SELECT a FROM t"),
        ("WITH c AS (SELECT 1) SELECT * FROM c; x", "WITH c AS (SELECT 1) SELECT * FROM c;"),
        ("SELECT 'open FROM t; x", "SELECT 'open FROM t;"),
        ("I do not know", "I do not know"),
        ("", ""),
    ],
)
def test_extract_sql(text, sql):
    assert extract_sql(text) == sql


def test_extract_sql_leaves_every_gold_statement_as_it_is():
    for e in ALL:
        assert extract_sql(e.completion) == e.completion
        assert extract_sql(f"{e.completion} SELECT 1;\n") == e.completion


@pytest.mark.parametrize(
    "part", ["\n", "\n ", "SELECT ", "WITH ", "WITH\n", "```", "```a", "'", "SELECT '\"", "\n\t", "--\n"]
)
def test_extract_sql_takes_no_longer_than_its_text(part):
    started = time.process_time()
    extract_sql(part * 50_000)
    extract_sql(f"SELECT 1{part * 50_000}x")
    assert time.process_time() - started < 5


def test_execution_accuracy_is_the_fraction_that_matches():
    golds = [f"```sql\n{e.completion}\n```" for e in TRAIN[:4]]
    assert execution_accuracy(golds, TRAIN[:4]) == 1.0
    assert execution_accuracy([*golds[:3], "no"], TRAIN[:4]) == 0.75
    assert execution_accuracy([""] * 4, TRAIN[:4]) == 0.0


@pytest.mark.parametrize(("predictions", "examples"), [([], []), (["SELECT 1;"], [])])
def test_execution_accuracy_needs_one_prediction_for_each_example(predictions, examples):
    with pytest.raises(CTError, match="give one for each, and at least one"):
        execution_accuracy(predictions, examples)
