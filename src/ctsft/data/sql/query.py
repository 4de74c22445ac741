"""A small database that can be read and not changed, and what one query returns from it, within limits.

Run as a program this file is the child process of `worker`, which imports the standard library only. It writes `READY`
and then answers each line it reads, a JSON list of a `ddl` script, a query and the seconds that it may take (or null),
with one line: the JSON list of its rows, or null.
"""

import contextlib
import json
import math
import signal
import sqlite3
import sys
import time
from typing import Any

Answer = tuple[Any, ...]  # one row that a query returns

MAX_ROWS = 1_000
MAX_CHARACTERS = 1_000_000  # of all texts and blobs of an answer together; a number counts as 8
MAX_SQL = 100_000  # characters of a query
GRACE = 0.25  # seconds from the end of a query's time to the end of the process that does not heed it
READY = b"ready\n"
PROGRAM = __file__

_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 100_000,  # bytes of one value
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4 * MAX_SQL,
    sqlite3.SQLITE_LIMIT_COLUMN: 100,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 1_000,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 500,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 100_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
_HEAP = 64 * 2**20  # bytes that SQLite may hold
_MEMORY = 512 * 2**20  # bytes of addresses that the process may have


def _allowed(action: int, _: str | None, name: str | None, *__: str | None) -> int:
    reads = action in _READING and not (action == sqlite3.SQLITE_FUNCTION and name == "load_extension")
    return sqlite3.SQLITE_OK if reads else sqlite3.SQLITE_DENY


def database_of(ddl: str) -> sqlite3.Connection:
    """The filled database, in memory and from now on read-only."""
    database = sqlite3.connect(":memory:")
    database.executescript(ddl + "\n;PRAGMA temp_store = MEMORY; PRAGMA query_only = ON;")
    for limit, value in _LIMITS.items():
        database.setlimit(limit, value)
    database.set_authorizer(_allowed)
    return database


def answer_of(database: sqlite3.Connection, sql: str, time_limit: float) -> list[Answer] | None:
    """The rows of one SELECT, or None where it fails, takes more than `time_limit` seconds of the processor (as far as
    SQLite lets itself be stopped), or returns more than `MAX_ROWS` rows or `MAX_CHARACTERS` characters."""
    stop = time.process_time() + time_limit
    database.set_progress_handler(lambda: time.process_time() > stop, 1000)
    rows: list[Answer] = []
    size = 0
    try:
        for row in database.execute(sql):
            size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
            if len(rows) == MAX_ROWS or size > MAX_CHARACTERS:
                return None
            rows.append(row)
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError):
        return None
    return rows


# ---- the child process


def _confine() -> None:
    """Limit what this process may take, as far as the system can; it writes no file and leaves no core."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute(f"PRAGMA hard_heap_limit = {_HEAP}")  # of the process, and never to be raised again
    try:
        import resource
    except ImportError:
        return
    for name, most in (("RLIMIT_AS", _MEMORY), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (most, most))


@contextlib.contextmanager
def _alarm(seconds: float | None) -> Any:
    """The system ends this process after so many seconds of the processor: not every function of SQLite can be
    interrupted."""
    if seconds is None or not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, seconds + GRACE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _serve() -> None:
    _confine()
    out = sys.stdout.buffer
    out.write(READY)
    out.flush()
    known, database = None, None
    for line in sys.stdin.buffer:
        rows = None
        with contextlib.suppress(sqlite3.Error, MemoryError):
            ddl, sql, seconds = json.loads(line)
            if ddl != known or database is None:
                known, database = ddl, database_of(ddl)
            with _alarm(seconds):
                rows = answer_of(database, sql, math.inf if seconds is None else seconds)
        out.write(json.dumps(rows, default=lambda blob: {"hex": blob.hex()}).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    _serve()
