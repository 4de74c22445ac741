"""The process that runs SQL which nobody has read: it can be killed, and what it takes is limited (see `query`)."""

import atexit
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import wait
from typing import Any

from ctsft.data.sql.query import GRACE, MAX_CHARACTERS, MAX_SQL, PROGRAM, READY, Answer
from ctsft.errors import CTError

START = 60.0  # seconds that the start may take on a busy machine
PATIENCE = 10.0  # by the clock on the wall a query may take so many times its limit: the process may have to wait
_COMMAND = [sys.executable, "-I", "-S", "-B", PROGRAM]  # none of the user's paths, variables or packages


class _Silent(Exception):
    """No whole line came in time."""


class Worker:
    """One long-lived child process, started at the first question and anew after its death. Threads take turns."""

    def __init__(self) -> None:
        self.process: Any = None  # a subprocess.Popen[bytes]
        self.lock = threading.Lock()

    def answer(self, ddl: str, sql: str, time_limit: float) -> list[Answer] | None:
        """The rows that `sql` returns from the database of `ddl`, or None (see `query.answer_of`); None also where the
        process had to be killed. One that dies on its own is asked again, once. Raises `CTError` if it cannot start."""
        if len(sql) > MAX_SQL:
            return None
        request = json.dumps([ddl, sql, None if math.isinf(time_limit) else time_limit]).encode() + b"\n"
        with self.lock:
            for _ in range(2):
                try:
                    process = self.process or self._start()
                    process.stdin.write(request)
                    process.stdin.flush()
                    rows = json.loads(self._line(PATIENCE * (time_limit + GRACE)), object_hook=_blob)
                    return rows if rows is None else list(map(tuple, rows))
                except (EOFError, BrokenPipeError):
                    if self.close() == -getattr(signal, "SIGPROF", 0):  # its own alarm
                        return None
                except _Silent:
                    self.close()
                    return None
                except BaseException:  # Ctrl-C: the answer would be taken for the next one's
                    self.close()
                    raise
        return None

    def _start(self) -> Any:
        """A fresh process, in a session of its own: Ctrl-C is for us, who may go on."""
        try:
            self.process = subprocess.Popen(
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={k: v for k, v in os.environ.items() if k == "SYSTEMROOT"},
                start_new_session=True,
            )
            if self._line(START) != READY:
                raise EOFError("it said something else")
        except (OSError, EOFError, _Silent) as error:
            self.close()
            raise CTError(f"the process that runs SQL cannot be started with {sys.executable} ({error}).") from None
        return self.process

    def _line(self, seconds: float) -> bytes:
        """The next line that the process writes; EOFError if it ends before."""
        out = self.process.stdout
        stop = time.monotonic() + seconds
        line = bytearray()
        while not line.endswith(b"\n"):
            left = max(0.0, stop - time.monotonic())
            if not wait([out], None if math.isinf(left) else left) or len(line) > 8 * MAX_CHARACTERS:
                raise _Silent
            chunk = os.read(out.fileno(), 2**16)
            if not chunk:
                raise EOFError("it ended at once")
            line += chunk
        return bytes(line)

    def close(self) -> int | None:
        """End the process, if there is one; returns how it ended (see `subprocess.Popen.returncode`)."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.kill()  # does nothing to one that has ended
        with contextlib.suppress(OSError), process:
            pass  # its pipes are closed, its end is awaited
        return int(process.returncode)

    def forget(self) -> None:
        """In a fork the process is the parent's."""
        if self.process:
            self.process.returncode = 0
        self.process, self.lock = None, threading.Lock()


def _blob(found: dict[str, str]) -> bytes:
    return bytes.fromhex(found["hex"])


WORKER = Worker()
atexit.register(WORKER.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=WORKER.forget)
