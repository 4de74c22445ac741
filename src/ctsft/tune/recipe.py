"""The recipe of a fine-tuning run: every choice, with its default and its limits."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from ctsft.choices import AdapterOptions, BasisDtype, BasisKind, ModelDtype, SaveDtype, about
from ctsft.errors import CTError, wrong_fields
from ctsft.files import read_json

MOST = 1_000_000_000  # of anything that is counted: far beyond use, and within what torch counts with
Count = Annotated[int, Field(ge=1, le=MOST)]
Choices = TypeVar("Choices")
ADAPTER = {field.name: field for field in dataclasses.fields(AdapterOptions)}


def as_chosen(name: str, default: Any = dataclasses.MISSING, unsaid: str | None = None) -> Any:
    """The adapter's option `name` with its description, here with limits of its type, or another `default`; `unsaid`:
    what the command does, in words, where it is not given."""
    default = ADAPTER[name].default if default is dataclasses.MISSING else default
    return dataclasses.field(default=default, metadata=ADAPTER[name].metadata | ({"unsaid": unsaid} if unsaid else {}))


def option(group: str, default: Any, told: str) -> Any:
    """A choice that is none of the adapter's: `group` is its heading among the options of `ctsft tune`."""
    return dataclasses.field(default=default, metadata=about(told) | {"group": group})


@dataclass(config=ConfigDict(extra="forbid"))
class Recipe(AdapterOptions):
    """What `ctsft tune` does. Unknown fields are refused; a finished run carries its recipe in run.json."""

    k: Count | Annotated[dict[str, Count], Field(min_length=1)] = as_chosen(
        "k", unsaid="auto where training takes five minutes or more, else 64"
    )
    basis: BasisKind = as_chosen("basis", "random")  # as good as W's own, and made in no time
    target_modules: list[str] | None = dataclasses.field(
        default=None,
        metadata=about("Name of modules to adapt, repeatable; without it, every linear layer but the head."),
    )
    amplitude_dropout: Annotated[float, Field(ge=0, lt=1)] = as_chosen("amplitude_dropout")
    basis_dtype: Literal["auto"] | BasisDtype = dataclasses.field(  # type: ignore[assignment]
        default="auto",
        metadata=about("Of the directions: `float32`, `bfloat16`, or `auto`, the model's if it can be."),
    )
    save_dtype: SaveDtype = dataclasses.field(
        default="float16",
        metadata=about("Of the trained numbers in the file; the run scores what the file holds."),
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = dataclasses.field(
        default=0, metadata=about("Of the data split, its order and random bases.")
    )

    model: str = option(
        "Model and data",
        "smollm2-135m",
        "Built-in name (smollm2-135m, photonic), Hugging Face folder, .gguf file or hub id.",
    )
    data: str = option(
        "Model and data",
        "sql",
        "sql (built in; sql:NAME: one database), a .jsonl, .json, .csv, .parquet or .txt file, or a hub dataset id.",
    )
    prompt_column: str | None = option("Model and data", None, "Name of the column with prompts, where it is another.")
    completion_column: str | None = option("Model and data", None, "Name of the column with completions, likewise.")
    limit: Count | None = option("Model and data", None, "Rows to train on at most; without it, all of them.")
    heldout: Annotated[float, Field(gt=0, le=MOST)] = option(
        "Model and data", 0.1, "Share (below 1) or number of rows held out and never trained on."
    )
    max_length: Annotated[int, Field(ge=2, le=MOST)] = option(
        "Model and data", 512, "Tokens a row at most; longer ones are cut, and counted."
    )
    dtype: ModelDtype = option("Model and data", "auto", "Of the frozen model; `auto`: as its file has it.")

    steps: Count = option("Training", 120, "Optimizer steps.")
    batch_size: Count = option("Training", 8, "Rows a step.")
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = option(
        "Training", "auto", "Peak of a linear schedule with 5% warm-up; `auto`: measured on four batches."
    )
    calibration_rows: Count = option("Training", 32, "Training rows that `gradient` and `activation` are made from.")
    threads: Annotated[int, Field(ge=1, le=1024)] = option("Training", 1, "Threads of torch.")

    eval_rows: Count = option("Measuring", 100, "Held-out rows that are scored before and after.")
    samples: Annotated[int, Field(ge=0, le=MOST)] = option("Measuring", 4, "Generations shown before and after.")
    max_new_tokens: Count = option("Measuring", 64, "Tokens of a generation at most.")

    def __post_init__(self) -> None:
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        raise CTError(f"a recipe is frozen: {name} cannot be set, make another one.")

    @field_validator("heldout")
    @classmethod
    def share_or_count(cls, heldout: float) -> float:
        if heldout >= 1 and not heldout.is_integer():
            raise ValueError("give a share below 1 or a whole number of rows")
        return heldout

    @property
    def title(self) -> str:
        """The adapter in a few words."""
        k = self.k if isinstance(self.k, int) else "mixed"
        return f"{self.form} K={k}, {self.basis} basis"

    def values(self) -> dict[str, Any]:
        """All fields as JSON values, the model and the data first."""
        return {"model": self.model, "data": self.data} | dataclasses.asdict(self)


FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))


def as_tuned(name: str, group: str | None = None) -> Any:
    """The field `name` of a recipe with its default and description, here under its own heading or that of `group`."""
    field = Recipe.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata={**field.metadata} | ({"group": group} if group else {}))


def checked(kind: type[Choices], values: dict[str, Any], what: str = "the options are") -> Choices:
    """A `kind`, a pydantic dataclass, of `values`; or one CTError, `what` wrong, that names every wrong field."""
    try:
        return kind(**values)
    except TypeError as error:  # a name that stands for the object itself
        raise CTError(f"{what} wrong: {error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # all fields are right, their combination is not
            raise first["ctx"]["error"] from None
        raise CTError(f"{what} wrong: {wrong_fields(error, values)}.") from None


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A Recipe, or one CTError that names every wrong field."""
    return checked(Recipe, values, "the recipe is")


def read_recipe(path: Path) -> Recipe:
    """The recipe in the JSON file `path`; CTError where there is none of this version."""
    values = read_json(path)
    try:
        return make_recipe(values if isinstance(values, dict) else {"recipe": values})
    except CTError as error:
        raise CTError(f"{path} is not from this ctsft: {error}") from None
