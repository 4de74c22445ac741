"""The contest of `ctsft compare`: every choice about comparing methods on one's data, with its default."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ctsft.errors import CTError
from ctsft.files import read_json
from ctsft.plan.arms import DEFAULT, candidate
from ctsft.plan.asked import Asked
from ctsft.tune.recipe import MOST, Count, as_tuned, checked, option

Rates = Literal["rule", "short", "full"]
FREE = ("arms", "seeds", "rates")  # what may be asked anew of a contest that has begun: no trial depends on them


@dataclass(config=ConfigDict(extra="forbid"))
class Contest(Asked):
    """What `ctsft compare` does. Unknown fields are refused."""

    arms: list[str] | None = option(
        "Comparison",
        None,
        f"What is compared, METHOD-K or METHOD-K@BASIS, with commas between (default: {', '.join(DEFAULT)}).",
    )
    seeds: Annotated[int, Field(ge=1, le=1000)] = option("Comparison", 3, "Times that each arm is trained.")
    rates: Rates = option(
        "Comparison",
        "short",
        "How the rate of every arm is found: `rule`: measured on four batches; `short`: the best of races at a third "
        "of it, at it and at three times it, over a quarter of the steps; `full`: the same over all steps.",
    )
    steps: Count = as_tuned("steps")
    batch_size: Count = as_tuned("batch_size")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = option("Comparison", 0, "Of the data split.")
    threads: Annotated[int, Field(ge=1, le=1024)] = as_tuned("threads")

    eval_rows: Count = option(
        "Measuring", 100, "Held-out rows that are scored at the start, at the end and on the way."
    )
    questions: Annotated[int, Field(ge=0, le=MOST)] = option(
        "Measuring", 32, "Of `sql`: held-out questions that every trained model answers; 0: none."
    )
    max_new_tokens: Count = as_tuned("max_new_tokens")

    def __post_init__(self) -> None:
        names = [candidate(name).name for name in self.arms or DEFAULT]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise CTError(f"{twice[0]} is among the arms twice; name each once.")
        self.arms = names
        self.recipe()  # which checks the rest

    def fit(self, most: int) -> None:
        """Where nobody asked for other arms than the default ones: ours with a K of `most` at most."""
        if self.arms == [*DEFAULT]:
            found = [candidate(name) for name in DEFAULT]
            self.arms = [replace(c, k=min(c.k, most)).name if c.arm.kind == "form" else c.name for c in found]

    def add(self, arms: list[str] | None) -> None:
        """Compare `arms`, names of candidates, too, after those that are there."""
        self.arms = list(dict.fromkeys([*(self.arms or ()), *(arms or ())]))

    def values(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    def fixed(self) -> dict[str, Any]:
        """Those that every trial depends on."""
        return {name: value for name, value in self.values().items() if name not in FREE}


def make_contest(values: dict[str, Any]) -> Contest:
    """A Contest, or one CTError that names every wrong field."""
    return checked(Contest, values)


def read_contest(path: Path) -> Contest:
    """The contest in the JSON file `path`; CTError where there is none of this version."""
    values = read_json(path)
    try:
        return make_contest(values if isinstance(values, dict) else {"contest": values})
    except CTError as error:
        raise CTError(f"{path} is not from this ctsft: {error}") from None
