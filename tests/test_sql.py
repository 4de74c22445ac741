import hashlib
import json
import re
import time
from collections import Counter
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctsft.data.sql import (
    DOMAINS,
    KINDS,
    MAX_EXAMPLES,
    Example,
    execution_accuracy,
    execution_match,
    extract_sql,
    generate,
)
from ctsft.errors import CTError

TRAIN = generate(600, 0, "train")
HELDOUT = generate(300, 0, "heldout")
ALL = TRAIN + HELDOUT
ONE = Example("", "SELECT 1;", "tiny", "CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (1);", "filter")


def question(example):
    return example.prompt.split("Question: ")[1].removesuffix("\nSQL:")


def misses(pattern, replacement):
    """The examples whose SQL the substitution changes, and how many of the changed queries still score."""
    changed = [(re.sub(pattern, replacement, e.completion, count=1), e) for e in ALL]
    changed = [(bad, e) for bad, e in changed if bad != e.completion]
    return len(changed), sum(execution_match(bad, e) for bad, e in changed)


# ---- generate


def test_the_first_fifty_training_examples_never_change():
    text = json.dumps([astuple(e) for e in generate(50, 0, "train")])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "0c49e2e39172ab67b9294c4b6820b0296f8f55793e9d9bc034850e8d1432f15b"
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(-(2**63), 2**63), st.sampled_from(["train", "heldout"]), st.integers(1, 8))
def test_every_seed_gives_distinct_examples_that_answer_themselves(seed, split, n):
    examples = generate(n, seed, split)
    assert examples == generate(n + 1, seed, split)[:n]
    assert len({e.prompt for e in examples}) == n
    assert execution_accuracy([e.completion for e in examples], examples) == 1.0


def test_seeds_and_splits_differ():
    prompts = [{e.prompt for e in generate(50, seed, split)} for seed in (0, 1) for split in ("train", "heldout")]
    assert len(set.union(*prompts)) == 200


def test_the_splits_share_no_schema_and_no_table():
    def words(split):
        blocks = [block.splitlines() for block in DOMAINS[split].strip().split("\n\n")]
        names = [name for name, *_ in blocks]
        tables = [word for _, *lines in blocks for line in lines for word in line.split()[:2]]
        assert len(set(names)) == len(names) and len(set(tables)) == len(tables)
        return set(names), set(tables)

    (train_names, train_tables), (names, tables) = words("train"), words("heldout")
    assert not train_names & names and not train_tables & tables
    assert len(train_names) >= 30 and len(names) >= 12
    created = {table for e in HELDOUT for table in re.findall(r"CREATE TABLE (\w+)", e.ddl)}
    assert not created & {table for e in TRAIN for table in re.findall(r"CREATE TABLE (\w+)", e.ddl)}
    assert {e.schema for e in TRAIN} == train_names and {e.schema for e in HELDOUT} == names


def test_every_range_holds_fifteen_different_numbers():
    for low, high in re.findall(r"[#$~]([\d.]+)-([\d.]+)", "".join(DOMAINS.values())):
        assert (float(high) - float(low)) * 10 ** len(low.partition(".")[2]) >= 14, f"{low}-{high}"


@pytest.mark.parametrize("examples", [TRAIN, HELDOUT])
def test_half_of_the_questions_are_easy_and_every_kind_occurs(examples):
    kinds = Counter(e.kind for e in examples)
    assert set(kinds) == set(KINDS) and sum(share for share, _ in KINDS.values()) == 100
    easy = sum(kinds[k] for k in ("lookup", "filter", "count", "aggregate", "distinct"))
    assert 0.42 < easy / len(examples) < 0.62


def test_the_sql_is_one_canonical_line():
    for e in ALL:
        assert re.fullmatch(r"SELECT [^;\n]+ FROM [^;\n]+;", e.completion)
        assert " AS " not in e.completion and '"' not in e.completion and "!=" not in e.completion
        assert ("JOIN" in e.completion) == e.kind.startswith("join")


def test_the_question_quotes_the_values_and_the_prompt_lists_the_columns():
    for e in ALL:
        for value in re.findall(r"(?:=|<>) '((?:[^']|'')*)'", e.completion):
            assert value.replace("''", "'").lower() in question(e).lower()
        bare = re.sub(r"'(?:[^']|'')*'", "", e.completion)
        for name in set(re.findall(r"[a-z_]{3,}", bare)):
            assert re.search(rf"\b{name}\b", e.prompt.split("\nQuestion")[0]), (name, e.prompt)


def test_prompts_are_short_and_varied():
    assert sum(len(e.prompt) for e in ALL) / len(ALL) < 260 and max(len(e.prompt) for e in ALL) < 400
    assert len({question(e).split()[0].lower() for e in ALL}) >= 15
    shapes = {re.sub(r"'.*?'|\".*?\"|\d+", "_", question(e)) for e in ALL}
    assert len(shapes) > 0.8 * len(ALL)


def test_tables_have_eight_to_fifteen_rows():
    for e in ALL[:100]:
        for table, rows in re.findall(r"INSERT INTO (\w+) VALUES (.*);", e.ddl):
            assert 8 <= rows.count("), (") + 1 <= 15, table


@pytest.mark.parametrize("n", [0, -1, MAX_EXAMPLES + 1])
def test_a_number_of_examples_that_cannot_be_met_is_refused(n):
    with pytest.raises(CTError, match=rf"n is {n}; ask for 1 to {MAX_EXAMPLES}"):
        generate(n, 0, "train")


def test_an_unknown_split_is_refused():
    with pytest.raises(CTError, match="'test'; it must be one of train, heldout"):
        generate(1, 0, "test")


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


def test_execution_accuracy_is_the_fraction_that_matches():
    golds = [f"```sql\n{e.completion}\n```" for e in TRAIN[:4]]
    assert execution_accuracy(golds, TRAIN[:4]) == 1.0
    assert execution_accuracy([*golds[:3], "no"], TRAIN[:4]) == 0.75
    assert execution_accuracy([""] * 4, TRAIN[:4]) == 0.0


@pytest.mark.parametrize(("predictions", "examples"), [([], []), (["SELECT 1;"], [])])
def test_execution_accuracy_needs_one_prediction_for_each_example(predictions, examples):
    with pytest.raises(CTError, match="give one for each, and at least one"):
        execution_accuracy(predictions, examples)
