"""The process that runs a model's SQL: what it may take, how it ends, and that its answers are right after each end."""

import ast
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctsft.data.sql.execution import execution_match
from ctsft.data.sql.query import MAX_CHARACTERS, MAX_ROWS, MAX_SQL, PROGRAM, answer_of, database_of
from ctsft.data.sql.worker import WORKER, Worker
from ctsft.errors import CTError
from fuzz import TOKENS, budget, changed, outcome, seeds
from test_sql_examples import ALL
from test_sql_execution import ONE

TEN = "(SELECT 1 AS x" + " UNION ALL SELECT 1" * 9 + ")"
SLOW = f"SELECT COUNT(*) FROM {', '.join(f'{TEN} AS t{i}' for i in range(14))}"
DEAF = "SELECT printf('%.*c', 1000000000, 'x')"  # one call of a function, which SQLite cannot interrupt

SQL = (*TOKENS, b"(", b")", b"'", b" OR ", b" NOT ", b" UNION SELECT ", b" JOIN ", b", ", b"*", b";", b"--", b"x'00ff'")

BAD = {
    "a text of 1 GB": DEAF,
    "900 searches": "SELECT "
    + " + ".join(f"instr(hex(zeroblob({49_000 - i})), hex(zeroblob({24_000 - i})) || 'x')" for i in range(900)),
    "a recursion without end": "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT COUNT(*) FROM c",
    "a product of 14 tables": SLOW,
    "472 MB": f"SELECT {', '.join(['hex(zeroblob(49000))'] * 90)} FROM {', '.join([TEN] * 3)}",
    "2 GB to sort": f"SELECT hex(randomblob(40000)) AS z FROM {', '.join(f'{TEN} t{i}' for i in range(5))} ORDER BY z",
    "one long text": f"SELECT group_concat(hex(zeroblob(40000))) FROM {', '.join(f'{TEN} t{i}' for i in range(4))}",
    "many rows": f"SELECT 1 FROM {', '.join(f'{TEN} t{i}' for i in range(4))}",
    "many columns": "SELECT " + "1," * 5_000 + "1",
    "many selects": "SELECT 1" + " UNION ALL SELECT 1" * 3_000,
    "deep brackets": "SELECT " + "(" * 5_000 + "1" + ")" * 5_000,
    "deep NOT": "SELECT " + "NOT " * 20_000 + "1",
    "deep OR": "SELECT " + "1 OR " * 15_000 + "1",
    "long SQL": "SELECT 1" + " " * MAX_SQL,
    "a long pattern": f"SELECT '{'a' * 20_000}' LIKE '{'%a' * 5_000}b'",
    "attach": "ATTACH 'other.db' AS other",
    "writable schema": "PRAGMA writable_schema = 1",
    "a higher limit": "PRAGMA hard_heap_limit = 0",
    "extension": "SELECT load_extension('libm.so.6')",
    "a written row": "INSERT INTO t VALUES (1)",
    "a written table": "CREATE TEMP TABLE u AS SELECT 1",
    "a NUL byte": "SELECT 1\0",
    "half a character": "SELECT '\ud800'",
    "no UTF-8": "SELECT CAST(x'ff' AS TEXT)",
}


@pytest.fixture
def worker():
    fresh = Worker()
    yield fresh
    fresh.close()


def gone(pid, seconds=20):
    """Whether the process ends, not even as a zombie, within `seconds`."""
    stop = time.monotonic() + seconds
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() > stop:
            return False
        time.sleep(0.01)


def peak(pid):
    """The most memory (MB) that a process has held, 0 where the system does not tell."""
    path = Path(f"/proc/{pid}/status")
    lines = path.read_text().splitlines() if path.exists() else ()
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)


# ---- what a query may take


@pytest.mark.parametrize("case", BAD)
def test_a_bad_query_costs_little_and_the_next_one_is_answered(worker, case):
    assert worker.answer(ONE.ddl, "SELECT a FROM t", 1.0) == [(1,)]
    pid, started = worker.process.pid, time.process_time()
    assert worker.answer(ONE.ddl, BAD[case], 0.3) is None
    assert time.process_time() - started < 1  # of ours
    assert worker.process is None or peak(pid) < 200
    assert (worker.process is None) == gone(pid, 0.0)
    assert worker.answer(ONE.ddl, "SELECT a FROM t", 1.0) == [(1,)]


def test_what_sqlite_cannot_stop_is_killed_by_the_time_it_takes(worker):
    started = time.monotonic()
    assert worker.answer(ONE.ddl, DEAF, 0.2) is None
    assert worker.process is None
    assert 0.2 <= time.monotonic() - started < 8  # 0.45 s of the processor, which is shared


def test_one_that_does_not_end_by_itself_is_killed_by_the_clock(worker, monkeypatch):
    monkeypatch.setattr("ctsft.data.sql.worker.PATIENCE", 1.0)
    worker.answer(ONE.ddl, "SELECT 1", 1.0)
    pid = worker.process.pid
    os.kill(pid, signal.SIGSTOP)
    assert worker.answer(ONE.ddl, "SELECT 1", 0.1) is None
    assert gone(pid)


def test_an_answer_has_limits():
    database = database_of("CREATE TABLE t (a); INSERT INTO t VALUES (1); -- the end")
    thousand = f"SELECT 1 FROM {', '.join([TEN] * 3)}"
    assert len(answer_of(database, thousand, math.inf)) == MAX_ROWS
    assert answer_of(database, f"{thousand} UNION ALL SELECT 1", math.inf) is None
    tenth = MAX_CHARACTERS // 10
    assert len(answer_of(database, f"SELECT zeroblob({tenth}) FROM {TEN}", math.inf)) == 10
    assert answer_of(database, f"SELECT zeroblob({tenth}), 1 FROM {TEN}", math.inf) is None
    assert answer_of(database, f"SELECT zeroblob({tenth + 1})", math.inf) is None  # one value
    database.close()


def test_the_database_cannot_be_written():
    database = database_of("CREATE TABLE t (a); INSERT INTO t VALUES (1)")
    for sql in ("UPDATE t SET a = 2", "PRAGMA query_only = OFF", "DELETE FROM sqlite_master", "VACUUM"):
        assert answer_of(database, sql, math.inf) is None
    database.set_authorizer(None)  # nor where the first guard fails
    assert answer_of(database, "UPDATE t SET a = 2", math.inf) is None
    assert answer_of(database, "SELECT a FROM t", math.inf) == [(1,)]
    database.close()


def test_every_value_comes_back_as_it_is(worker):
    values = "1, -9223372036854775808, 0.1, 1e300, 9e999, 'é\U0001f600\u2028', char(0), char(10), x'00ff', NULL, ''"
    database = database_of("")
    assert worker.answer("", f"SELECT {values}", 1.0) == answer_of(database, f"SELECT {values}", 1.0)
    assert worker.answer("", "SELECT 1 WHERE 0", 1.0) == []
    database.close()


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")), st.text(max_size=60)))
def test_any_text_gets_the_answer_that_sqlite_gives(text):
    database = database_of(ONE.ddl)
    assert WORKER.answer(ONE.ddl, text, 1.0) == answer_of(database, text, 1.0)
    assert WORKER.answer(ONE.ddl, f"SELECT '{text}', a FROM t", 1.0) == answer_of(
        database, f"SELECT '{text}', a FROM t", 1.0
    )
    database.close()


@budget(300)
@given(seed=seeds())
def test_a_damaged_query_gets_the_answer_that_sqlite_gives(seed):
    """`CTSFT_FUZZ` says how many (see `fuzz`)."""
    e = ALL[seed % len(ALL)]
    sql = changed(e.completion.encode(), seed, SQL).decode("utf-8", "surrogateescape")
    database = database_of(e.ddl)
    assert outcome(lambda: WORKER.answer(e.ddl, sql, 1.0), 20) == answer_of(database, sql, 1.0)
    assert outcome(lambda: execution_match(sql, e), 20) in (True, False)
    database.close()


def test_hundreds_of_queries_are_scored_a_second():
    execution_match("SELECT 1", ONE)
    started = time.monotonic()
    assert all(execution_match(e.completion, e) for e in ALL[:300])
    speed = 300 / (time.monotonic() - started)
    print(f"{speed:.0f} queries a second")
    assert speed > 100  # over 1,000 on a machine with nothing else to do


# ---- how the process begins and ends


def test_it_is_one_process_that_serves_all(worker):
    worker.answer(ONE.ddl, "SELECT 1", 1.0)
    pid = worker.process.pid
    for e in ALL[:20]:
        assert worker.answer(e.ddl, e.completion, 1.0)
        assert worker.answer(e.ddl, "SELECT nothing", 1.0) is None
    assert worker.process.pid == pid


def test_a_process_that_dies_on_its_own_is_asked_again(worker):
    worker.answer(ONE.ddl, "SELECT 1", 1.0)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        pid = worker.process.pid
        os.kill(pid, number)
        assert worker.answer(ONE.ddl, "SELECT 1", 1.0) == [(1,)]
        assert worker.process.pid != pid and gone(pid)


def test_one_that_cannot_be_started_is_one_sentence(worker, monkeypatch):
    for command in (["/nowhere/python"], [sys.executable, "-c", "print('hello')"], [sys.executable, "-c", ""]):
        monkeypatch.setattr("ctsft.data.sql.worker._COMMAND", command)
        with pytest.raises(CTError, match="the process that runs SQL cannot be started with"):
            worker.answer(ONE.ddl, "SELECT 1", 1.0)
        assert worker.process is None


def test_threads_take_turns(worker):
    wrong = []

    def ask(e):
        database = database_of(e.ddl)
        wrong.extend([e] * (worker.answer(e.ddl, e.completion, 1.0) != answer_of(database, e.completion, 1.0)))
        database.close()

    threads = [threading.Thread(target=ask, args=(e,)) for e in ALL[:30]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


SCRIPT = """
import os, signal, sys, time
from ctsft.data.sql.execution import Example, execution_match
from ctsft.data.sql.worker import WORKER
ONE = Example("", "SELECT 1;", "tiny", "", "filter")
assert execution_match("SELECT 1", ONE)
assert not {"torch", "transformers", "datasets", "numpy"} & set(sys.modules)
print(WORKER.process.pid, flush=True)
"""


def started(code):
    """A process of its own session that runs `SCRIPT` and `code`, and the process that answers it."""
    ours = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    line = b""
    while not line.endswith(b"\n"):  # no further: communicate does not know what a buffer holds
        line += os.read(ours.stdout.fileno(), 1) or b"\n"
    return ours, int(line)


def test_it_ends_with_us():
    ours, pid = started("")
    assert ours.communicate(timeout=60) == ("", None) and ours.returncode == 0
    assert gone(pid)


@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_where_we_are_killed(busy):
    ours, pid = started(f"execution_match({DEAF!r}, ONE)" if busy else "time.sleep(60)")
    time.sleep(0.2 * busy)
    with ours:
        ours.kill()
    assert gone(pid)


def test_ctrl_c_stops_a_query_and_no_answer_is_mixed_up():
    ours, pid = started(
        f"""
def stop(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, stop)
try:
    print("go", flush=True)
    execution_match({SLOW!r}, ONE, 60.0)
except KeyboardInterrupt:
    print(execution_match("SELECT 2", ONE), execution_match("SELECT 1", ONE))
"""
    )
    assert ours.stdout.readline() == "go\n"
    time.sleep(0.2)
    os.killpg(ours.pid, signal.SIGINT)
    assert ours.communicate(timeout=60) == ("False True\n", None) and ours.returncode == 0
    assert gone(pid)


def test_ctrl_c_that_is_only_noted_changes_no_verdict():
    ours, _ = started(
        """
signal.signal(signal.SIGINT, lambda *_: None)
os.killpg(os.getpid(), signal.SIGINT)
print(WORKER.process.poll(), all(execution_match("SELECT 1", ONE) for _ in range(20)))
"""
    )
    assert ours.communicate(timeout=60) == ("None True\n", None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_fork_has_a_process_of_its_own():
    ours, _ = started(
        """
pid = WORKER.process.pid
if os.fork() == 0:
    good = execution_match("SELECT 1", ONE) and not execution_match("SELECT 2", ONE) and WORKER.process.pid != pid
    WORKER.close()
    os._exit(7 if good else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]), execution_match("SELECT 1", ONE), WORKER.process.pid == pid)
"""
    )
    assert ours.communicate(timeout=60) == ("7 True True\n", None)


def scored(sql):
    return execution_match(sql, ONE)


def test_it_works_in_spawned_processes():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(scored, ["SELECT 1", "SELECT 2", DEAF]) == [True, False, False]


def test_the_child_imports_the_standard_library_only():
    tree = ast.parse(Path(PROGRAM).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
