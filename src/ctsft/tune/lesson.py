"""The lesson of `ctsft basis learn`: every choice about learning directions from siblings, with its default."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ctsft.choices import ModelDtype, about
from ctsft.errors import CTError
from ctsft.files import read_json
from ctsft.tune.recipe import MOST, Count, as_tuned, checked, option

DATA, LEARNING, MEASURING = "Model and data", "Learning", "Measuring"


@dataclass(config=ConfigDict(extra="forbid"))
class Lesson:
    """What `ctsft basis learn` does. Unknown fields are refused."""

    model: str = as_tuned("model")
    data: list[str] | None = option(
        DATA,
        None,
        "Siblings: files, hub data sets or sql:NAME, one each; sql alone: all its databases but those held out.",
    )
    by: str | None = option(DATA, None, "Column of the one file in --data: every value of it is a sibling.")
    prompt_column: str | None = as_tuned("prompt_column")
    completion_column: str | None = as_tuned("completion_column")
    limit: Count | None = option(DATA, None, "Rows of each sibling to train on at most; without it, all of them.")
    heldout: Annotated[float, Field(gt=0, le=MOST)] = option(
        DATA, 0.1, "Share (below 1) or number of rows of each sibling held out and never trained on."
    )
    max_length: Annotated[int, Field(ge=2, le=MOST)] = as_tuned("max_length")
    dtype: ModelDtype = as_tuned("dtype")

    k: Count | Annotated[dict[str, Count], Field(min_length=1)] = dataclasses.field(
        default=64,
        metadata=about("Directions per matrix, or a mapping from module pattern to K.")
        | {"group": LEARNING, "metavar": "K|PATTERN=K,..."},
    )
    nested: bool = option(
        LEARNING, False, "Let the first few directions serve alone too, so that adapters may use a smaller K."
    )
    target_modules: list[str] | None = as_tuned("target_modules", LEARNING)
    steps: Count = option(LEARNING, 320, "Optimizer steps.")
    batch_size: Count = option(LEARNING, 4, "Rows a step, of up to four siblings in turn.")
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = option(
        LEARNING, 0.002, "Adam's rate for the directions; amplitudes learn ten times as fast."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = option(LEARNING, 0, "Of the data split, its order and the start.")
    threads: Annotated[int, Field(ge=1, le=1024)] = as_tuned("threads", LEARNING)

    eval_rows: Count = option(MEASURING, 32, "Held-out rows of each sibling that are scored before and after.")

    def __post_init__(self) -> None:
        if not self.data:
            raise CTError("there is nothing to learn from; give --data, a file for every sibling.")

    def values(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


FIELDS = tuple(field.name for field in dataclasses.fields(Lesson))


def make_lesson(values: dict[str, Any]) -> Lesson:
    """A Lesson, or one CTError that names every wrong field."""
    return checked(Lesson, values)


def read_lesson(path: Path) -> Lesson:
    """The lesson in the JSON file `path`; CTError where there is none of this version."""
    values = read_json(path)
    try:
        return make_lesson(values)
    except CTError as error:
        raise CTError(f"{path} is not from this ctsft: {error}") from None
