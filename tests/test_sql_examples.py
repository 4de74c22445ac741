import hashlib
import json
import re
from collections import Counter
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctsft.data.sql.examples import DATABASES, MAX_EXAMPLES, MAX_ONE, generate, generate_one
from ctsft.data.sql.execution import execution_accuracy
from ctsft.data.sql.questions import KINDS
from ctsft.data.sql.words import DOMAINS
from ctsft.errors import CTError

TRAIN = generate(600, 0, "train")
HELDOUT = generate(300, 0, "heldout")
ALL = TRAIN + HELDOUT


def question(example):
    return example.prompt.split("Question: ")[1].removesuffix("\nSQL:")


def test_the_first_fifty_training_examples_never_change():
    text = json.dumps([astuple(e) for e in generate(50, 0, "train")])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "0c49e2e39172ab67b9294c4b6820b0296f8f55793e9d9bc034850e8d1432f15b"
    )


def test_the_held_out_examples_never_change():
    text = json.dumps([astuple(e) for e in generate(200, 0, "heldout")])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "8c09f3bf04964822a10f0d71159e36b4abdaf397b231318ec8bd421bb45d7f2a"
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(-(2**63), 2**63), st.sampled_from(["train", "heldout"]), st.integers(1, 8))
def test_every_seed_gives_distinct_examples_that_answer_themselves(seed, split, n):
    examples = generate(n, seed, split)
    assert examples == generate(n + 1, seed, split)[:n]
    assert len({e.prompt for e in examples}) == n
    assert execution_accuracy([e.completion for e in examples], examples) == 1.0


@pytest.mark.parametrize("name", ["law", "clinic", "zoo"])  # two with few questions, and one more
def test_one_database_has_many_questions_that_answer_themselves(name):
    examples = generate_one(MAX_ONE, 0, name)
    assert len({e.prompt for e in examples}) == MAX_ONE and len({(e.ddl, e.schema) for e in examples}) == 1
    assert generate_one(5, 0, name) == examples[:5] != generate_one(5, 1, name)
    some = examples[::100]
    assert execution_accuracy([e.completion for e in some], some) == 1.0


def test_every_domain_has_a_database():
    assert set(DATABASES) == {e.schema for e in ALL}
    assert [generate_one(1, 0, name)[0].schema for name in DATABASES] == list(DATABASES)


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
