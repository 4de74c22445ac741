"""What a plan holds, plan.json: written by `ctsft plan`, read by its page, the command and the check. No torch."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ctsft.errors import CTError, wrong_fields
from ctsft.files import read_json
from ctsft.plan.choose import Decision, Option
from ctsft.plan.predict import FAR
from ctsft.tune.record import Machine, Part

FORMAT = 1


class Race(Part):
    """How long the races are: steps, rows a step, and rows that are held out and scored."""

    steps: int
    rows: int
    heldout: int


class Plan(Part):
    """One plan. Losses are held out, in nats per token."""

    format: int = FORMAT
    created: str
    model: str
    data: str
    question: dict[str, Any]
    rows: int = Field(description="there are to train on")
    heldout: int = Field(description="rows held out and scored; the races score some of them")
    tokens: float = Field(description="of a row, on average")
    parameters: int = Field(description="of the model")
    start: float = Field(description="loss of the untouched model")
    race: Race
    options: list[Option]
    decision: Decision
    tune: str | None = Field(description="the command that trains what is recommended")
    seconds: float = Field(description="that planning took, after the model was loaded")
    share: float = Field(description="of the planned training's seconds")
    notes: list[str]
    versions: dict[str, str]
    machine: Machine

    @property
    def chosen(self) -> Option | None:
        return next((o for o in self.options if o.candidate == self.decision.candidate), None)

    @property
    def measured(self) -> list[str]:
        """What was measured, in sentences."""
        ran = [o for o in self.options if o.raced]
        rest = [o.candidate for o in self.options if not o.raced]
        told = [
            f"{len(ran)} arms each found its learning rate on four batches and trained {self.race.steps} steps of "
            f"{self.race.rows} rows, all on the same rows; {self.race.heldout} held-out rows were scored before and "
            "after. As far as there was time, they ran again at a third and at three times that rate, and further on "
            "where it was better; the best race counts.",
            "The loss after the planned steps, and its 90% interval, follow from how far such races went on in whole "
            "trainings of other models and texts.",
        ]
        longer = max(o.steps for o in self.options) / self.race.steps
        if longer > FAR:
            told.append(
                f"The training is {longer:,.0f} times as long as a race. No training beyond {FAR} times was seen, so "
                "losses are predicted as if it ended there, and the intervals are wider."
            )
        if rest:
            told.append(
                f"There was no time for {', '.join(rest)}: predicted from the arms that ran and the count of numbers."
            )
        return told


def read_plan(path: Path) -> Plan:
    """The plan in the JSON file `path`; CTError where there is none of this version."""
    values = read_json(path)
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        raise CTError(f"{path} is no plan of this ctsft: {wrong_fields(error)}.") from None
