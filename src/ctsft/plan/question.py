"""The question of `ctsft plan`: every choice, with its default and its limits."""

import dataclasses
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ctsft.choices import about
from ctsft.plan.asked import Asked
from ctsft.plan.budget import Budget, parse_budget
from ctsft.tune.recipe import MOST, Count, as_tuned, checked, option

PLANNING = "Planning"


@dataclass(config=ConfigDict(extra="forbid"))
class Question(Asked):
    """What `ctsft plan` is asked. Unknown fields are refused."""

    budget: str | None = option(
        PLANNING, None, "What there is to spend: 15 min, 20 KB, 2000 steps or 5000 numbers; two with a comma between."
    )
    steps: Count = option(PLANNING, 120, "Optimizer steps, where the budget says neither steps nor a time.")
    batch_size: Count = as_tuned("batch_size")
    basis: str | None = dataclasses.field(
        default=None,
        metadata=about("Folder of learned directions that are at hand; they are weighed with the rest.")
        | {"group": PLANNING, "metavar": "FOLDER"},
    )
    arms: list[str] | None = option(
        PLANNING,
        None,
        "Arms to weigh, repeatable: diagonal-16, lora-8, core (at several K); without it, a few of each size.",
    )
    spend: Annotated[float, Field(gt=0, le=MOST)] | None = option(
        PLANNING, None, "Seconds that planning may take; without it, 3% of the training or a minute, if that is more."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = as_tuned("seed", PLANNING)
    threads: Annotated[int, Field(ge=1, le=1024)] = as_tuned("threads")

    def __post_init__(self) -> None:
        self.allowed()

    def allowed(self) -> Budget:
        """The budget; CTError where it is not understood."""
        return parse_budget(self.budget)


FIELDS = tuple(field.name for field in dataclasses.fields(Question))


def make_question(values: dict[str, Any]) -> Question:
    """A Question, or one CTError that names every wrong field."""
    return checked(Question, values)
