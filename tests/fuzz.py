"""Changes to bytes, each made by its seed, and what all fuzz tests (`tests/test_fuzz_*.py`) hold a reader to.

The oracle is *the same as without the change, or one sentence*: never another exception, never without end.
`CTSFT_FUZZ=100000 pytest tests/test_fuzz_data.py` tries so many changes a test, others every time; without it a test
tries a few hundred, always the same.
"""

import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ctsft.errors import CTError

TOKENS = (b"\x00", b"\xff", b"\n", b'"', b",", b"[", b"]", b"{", b"}", b"null", b"-1", b"1e999", b"NaN", b"\\ud83d")


def budget(few: int) -> Any:
    """Settings of a hypothesis test: `few` examples, or as many as `CTSFT_FUZZ` says."""
    asked = os.environ.get("CTSFT_FUZZ")
    return settings(
        max_examples=int(asked or few), derandomize=not asked, deadline=None, suppress_health_check=list(HealthCheck)
    )


def changed(raw: bytes, seed: int, tokens: Sequence[bytes] = TOKENS) -> bytes:
    """`raw` after one to four changes: a flipped bit, another byte, a part that is gone, doubled, moved or cut off, or
    one of `tokens` put in."""
    draw = random.Random(seed)
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        a, b = sorted(draw.randint(0, len(data)) for _ in range(2))
        if draw.random() < 0.7:  # most parts are short
            b = min(b, a + draw.randint(1, 16))
        part = bytes(data[a:b])
        change = draw.choice(("bit", "byte", "token", "token", "drop", "double", "move", "end"))
        if change == "bit" and a < len(data):
            data[a] ^= 1 << draw.randrange(8)
        elif change == "byte" and a < len(data):
            data[a] = draw.randrange(256)
        elif change == "token":
            data[a:a] = draw.choice(tokens)
        elif change == "double":
            data[a:a] = part
        elif change in ("drop", "move"):
            del data[a:b]
            if change == "move":
                to = draw.randint(0, len(data))
                data[to:to] = part
        elif change == "end" and draw.random() < 0.3:
            del data[a:]
    return bytes(data)


def seeds() -> st.SearchStrategy[int]:
    """Of changes: a failing example names its seed, from which `changed` makes the bytes again."""
    return st.integers(0, 2**63 - 1)


def outcome(call: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What `call` returns, or its CTError, which must be one sentence. Whatever else it raises fails the test, and so
    does one that takes longer than `seconds`."""
    with ending_within(seconds):
        try:
            return call()
        except CTError as error:
            assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 1000, error
            str(error).encode()
            return error


@contextmanager
def ending_within(seconds: float) -> Iterator[None]:
    """AssertionError inside the block, where it runs on the main thread, after so many seconds."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"it takes longer than {seconds} s")

    if not hasattr(signal, "setitimer"):
        yield
        return
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
