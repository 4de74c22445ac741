import io
import time

import pytest
from rich.console import Console

from ctsft import progress
from ctsft.progress import waiting, watched


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    monkeypatch.setattr(progress, "DELAY", 0.0)


def slowly(count, file):
    with watched(range(count), "making", file=file) as shown:
        for i in shown:
            shown.set_postfix_str(f"loss {i}", refresh=False)
            time.sleep(0.03)


def test_no_terminal_gets_plain_lines_with_time_left(quick):
    file = io.StringIO()
    slowly(10, file)
    lines = file.getvalue().splitlines()
    assert 2 <= len(lines) <= 7 and all(line.startswith("making: ") and " of 10, 00:0" in line for line in lines)
    assert " left, loss " in lines[0] and "\r" not in file.getvalue() and "" not in lines


def test_what_is_soon_done_prints_nothing():
    file, terminal = io.StringIO(), Terminal()
    for out in (file, terminal):
        slowly(2, out)
        assert out.getvalue() == ""


def test_a_terminal_gets_a_bar_that_goes_away(quick):
    file = Terminal()
    slowly(10, file)
    assert "making: " in file.getvalue() and "\n" not in file.getvalue() and "/10 [" in file.getvalue()
    assert file.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip() == ""


def test_waiting_tells_the_seconds_where_there_is_no_terminal(quick):
    file = io.StringIO()
    with waiting(Console(file=file), "loading [a]"):
        time.sleep(0.2)
    told = file.getvalue().splitlines()
    assert 2 <= len(told) <= 4 and set(told) == {"loading [a]: 0 s"}
    time.sleep(0.1)
    assert file.getvalue().splitlines() == told


def test_waiting_stops_when_what_it_waits_for_fails(quick):
    file = io.StringIO()
    with pytest.raises(ValueError, match="no"), waiting(Console(file=file), "loading"):
        raise ValueError("no")
    time.sleep(0.1)
    assert file.getvalue() == ""


def test_without_a_text_nothing_is_told_and_the_items_come(quick):
    file = io.StringIO()
    for _ in watched(range(5), None, file=file):
        time.sleep(0.03)
    assert file.getvalue() == ""
