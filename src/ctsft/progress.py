"""What takes long tells how much is left: a bar on a terminal, elsewhere a plain line every ten seconds."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from rich.console import Console

DELAY = 2.0  # seconds before a bar shows
EVERY = 10.0  # seconds between plain lines
LINE = "{desc}: {n_fmt} of {total_fmt}, {remaining} left{postfix}"


class Lines:
    """A text file that gets what tqdm draws over and over as lines, one below the other."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if line := text.strip():
            self.file.write(line + "\n")

    def flush(self) -> None:
        self.file.flush()


def watched(
    items: Iterable[Any] | None = None, text: str | None = "", total: int | None = None, file: IO[str] | None = None
) -> Any:
    """`items`, telling on `file` (standard error) how many of `total` are done; nothing where `text` is None.

    Without items, call `update(n)` of what is returned. What is done within seconds is not told of.
    """
    file = file or sys.stderr
    settings: dict[str, Any] = {"desc": text, "total": total, "leave": False, "disable": text is None}
    if file.isatty():
        columns = shutil.get_terminal_size().columns  # 80 where the terminal does not tell; tqdm would show nothing
        return tqdm(items, **settings, file=file, delay=DELAY, ncols=columns - 1)
    return tqdm(items, **settings, file=Lines(file), delay=EVERY, mininterval=EVERY, miniters=1, bar_format=LINE)


@contextmanager
def counted(text: str, file: IO[str] | None = None) -> Iterator[Callable[[int, int, str], None]]:
    """A function `show(done, total, name)` for what counts for itself; it tells as `watched` does."""
    with watched(text=text, total=1, file=file) as shown:

        def show(done: int, total: int, name: str) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield show


@contextmanager
def waiting(console: "Console", text: str) -> Iterator[None]:
    """Around what has no steps to count: `text` with a spinner on a terminal, elsewhere with the seconds so far."""
    if console.is_terminal:
        from rich.markup import escape

        with console.status(escape(text)):
            yield
        return
    began, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(EVERY):
            console.print(f"{text}: {time.monotonic() - began:.0f} s", markup=False, highlight=False, soft_wrap=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
