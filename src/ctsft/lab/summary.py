"""What the verdicts come to, in a few sentences for a reader who knows none of the papers; numbers are the records'."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from ctsft.errors import CTError, wrong_fields
from ctsft.files import read_toml
from ctsft.lab.spec import Strict
from ctsft.lab.verdicts import Verdict

NAME = "summary.toml"
PARTS: dict[str, Callable[[float], str]] = {  # of the mean that a claim's verdict rests on
    "mean": lambda mean: f"{mean:.2g}",
    "size": lambda mean: f"{abs(mean):.2g}",
    "points": lambda mean: f"{abs(100 * mean):.2g}",
}


class Sentence(Strict):
    """One sentence, and the claims by the verdict that each must have for it to be told."""

    text: str
    confirmed: tuple[str, ...] = ()
    refuted: tuple[str, ...] = ()
    artefact: tuple[str, ...] = ()

    def stands(self, verdicts: dict[str, Verdict]) -> bool:
        wanted = {"confirmed": self.confirmed, "refuted": self.refuted, "artefact": self.artefact}
        return all(verdicts[name].verdict == word for word, names in wanted.items() for name in names)


def summary(folder: Path, verdicts: Sequence[Verdict]) -> list[str]:
    """The sentences of `summary.toml` in `folder` that the verdicts bear out, numbers filled in; none without the file.

    CTError for a wrong field, for a claim that is not there, and for a number that no claim has.
    """
    path = folder / NAME
    if not path.exists():
        return []
    by_id = {verdict.claim.id: verdict for verdict in verdicts}
    try:
        sentences = [Sentence(**values) for values in read_toml(path).get("sentence", [])]
        return [_filled(one.text, by_id) for one in sentences if one.stands(by_id)]
    except ValidationError as error:
        raise CTError(f"{path} is wrong: {wrong_fields(error)}.") from None
    except KeyError as error:
        raise CTError(f"{path} is wrong: there is no claim, or no number, {error.args[0]!r}.") from None


def _filled(text: str, by_id: dict[str, Verdict]) -> str:
    def number(found: re.Match[str]) -> str:
        side, part = by_id[found[1]].side, PARTS[found[2]]
        if side is None:
            raise KeyError(found[0])
        return part(side.show(side.test.mean))

    return re.sub(r"\{(\S+) (\w+)\}", number, text)
