"""The record of a run, run.json: written by the run, read by the report, the command and the tests."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ctsft.errors import CTError, shown, wrong_fields
from ctsft.files import read_json

FORMAT = 1
LARGEST = 1e100  # a float beyond it is damage


class Part(BaseModel):
    """A group of fields of the record; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")


class Machine(Part):
    platform: str
    cpu: str
    threads: int
    device: str


class ModelFacts(Part):
    name: str
    parameters: int = Field(ge=1)
    dtype: str
    note: str | None  # what a user must know before trusting the model


class DataFacts(Part):
    name: str
    kind: str
    train_rows: int
    heldout_rows: int
    truncated: int
    dropped: int
    notes: list[str]


class Costs(Part):
    """Trained numbers, bytes of the adapter's files, bytes beyond the frozen model, seconds of training."""

    trainable: int
    adapter_bytes: int
    extra_memory_bytes: int
    seconds: float


class Accuracy(Part):
    """Questions answered as wanted: how many, the 95% interval of their share, and [correct, total] by kind."""

    correct: int
    total: int
    low: float
    high: float
    by_kind: dict[str, list[int]] = {}


class Scores(Part):
    """What is measured before and after: the held-out loss in nats per token, and for `sql` the accuracy."""

    heldout_loss: float
    heldout_tokens: int
    accuracy: Accuracy | None


class Measured(Scores):
    """Scores with the texts that were generated, and whether each is right (None where nobody can tell)."""

    texts: list[str]
    ok: list[bool | None]

    def scores(self) -> Scores:
        return Scores(heldout_loss=self.heldout_loss, heldout_tokens=self.heldout_tokens, accuracy=self.accuracy)


class Point(Part):
    """A training step: its batch's loss in nats per token, the rate, and seconds and tokens since the start."""

    step: int
    loss: float | None
    learning_rate: float
    seconds: float
    tokens: int


class Spectrum(Part):
    """An adapted matrix (see `inspect.spectra_of`), and how far training moved it (Frobenius norms)."""

    name: str
    shape: list[Annotated[int, Field(ge=1)]] = Field(min_length=2, max_length=2)
    effective_rank: float
    stable_rank: float
    energy_top_k: float
    k: int
    largest: float
    coefficient_norm: float
    delta_over_weight: float | None  # None where the matrix is zero and training moved it


class Sample(Part):
    prompt: str
    reference: str
    before: str
    after: str
    before_ok: bool | None
    after_ok: bool | None


class Sources(Part):
    """What a run was started from, as hashes: the recipe, the rows, the same rows in tokens, the model's weights, and
    the shared file of directions, if there is one."""

    recipe: str
    data: str
    tokens: str
    weights: str
    directions: str | None = None


class Setback(Part):
    """A step back: after `step` steps the loss was `why`, and training went on from the state of step `back_to`, the
    rest of its schedule lowered to the peak rate `peak`."""

    step: int
    back_to: int
    why: str
    peak: float

    def told(self) -> str:
        """It in one sentence."""
        return (
            f"After step {self.step} the loss was {self.why}, so the run went on from its state of step "
            f"{self.back_to}, its lr lowered to {self.peak:g}."
        )


class Worse(Part):
    """Of a run whose loss rose: the scores when training ended (None: the loss was not finite), and the step whose
    state was kept in its place."""

    end: Scores | None
    kept_step: int


class RunRecord(Part):
    """All that is known of a finished run. `recipe` has the rate that was used besides the fields of the Recipe."""

    format: int = FORMAT
    name: str
    created: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    machine: Machine
    model: ModelFacts
    data: DataFacts
    fingerprint: str
    costs: Costs
    before: Scores
    after: Scores  # of the adapter that was written
    curve: list[Point]
    spectra: list[Spectrum]
    samples: list[Sample]
    steps: int
    resumed: bool | int
    worse: Worse | None = None
    setbacks: list[Setback] = []
    problems: list[str] = []  # what failed after the training, a sentence each

    def values(self) -> dict[str, Any]:
        """The content of run.json; `worse`, `setbacks` and `problems` are there only where they say something."""
        return self.model_dump(exclude={name for name in ("worse", "setbacks", "problems") if not getattr(self, name)})

    @property
    def warning(self) -> str:
        """What a user must see first, in one sentence: that the training ended worse than it began; else empty."""
        if self.worse is None:
            return ""
        before, step = self.before.heldout_loss, self.worse.kept_step
        end = f"{self.worse.end.heldout_loss:.3f}" if self.worse.end else "a number that is not finite"
        if step == self.steps:
            kept = "no state on the way was better than the last, which was kept"
        elif step == 0:
            kept = "no state on the way was better than the start, so the adapter that was kept is as it began"
        else:
            kept = f"the adapter that was kept is that of step {step}, with {self.after.heldout_loss:.3f}"
        return (
            f"The training ended worse than it began: the held-out loss rose from {before:.3f} to {end}; {kept}. "
            f"Try a smaller lr than {self.recipe.get('learning_rate', 0):g}."
        )

    @property
    def history(self) -> str:
        """How often the run was resumed, in words; of most runs it is known only whether."""
        if isinstance(self.resumed, bool):
            return "resumed after a stop" if self.resumed else ""
        return f"resumed {self.resumed} {'time' if self.resumed == 1 else 'times'}" if self.resumed else ""


def absurd(values: Any) -> int | float | None:
    """A number in the JSON value `values` that no run has, and that no plot can show, if there is one."""
    rest = [values]
    while rest:
        value = rest.pop()
        if isinstance(value, dict | list):
            rest += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int | float) and abs(value) > (LARGEST if isinstance(value, float) else 2**53):
            return value
    return None


def run_record(values: Any, source: object = "this record") -> RunRecord:
    """The record with `values` (JSON) that were read from `source`; one CTError where they are none of this format."""
    if not isinstance(values, dict) or "format" not in values:
        raise CTError(f"{source} is no record of a run; give the run.json that ctsft tune wrote.")
    if values["format"] != FORMAT:
        raise CTError(
            f"{source} has format {shown(repr(values['format']), 80)} and this ctsft reads {FORMAT}; use the "
            "ctsft that wrote it."
        )
    if (number := absurd(values)) is not None:
        raise CTError(f"{source} is no record of a run: it holds the number {shown(repr(number), 30)}.")
    try:
        return RunRecord.model_validate(values)
    except ValidationError as error:
        raise CTError(f"{source} is no record of a run: {wrong_fields(error)}.") from None


def read_run(path: Path) -> RunRecord:
    """The record in the file `path`; one CTError where there is none."""
    return run_record(read_json(path), path)
