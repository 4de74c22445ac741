"""The recipe of a fine-tuning run: every choice, with its default and its limits."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ctsft.errors import CTError, wrong_fields
from ctsft.files import read_json

K = Annotated[int, Field(ge=1)]


class Recipe(BaseModel):
    """What `ctsft tune` does. Unknown fields are refused; a finished run carries its recipe in run.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "smollm2-135m"
    data: str = "sql"
    k: K | Annotated[dict[str, K], Field(min_length=1)] = Field(
        default=64, description="directions per matrix, or {module pattern: K}"
    )
    form: Literal["diagonal", "core", "scores"] = "diagonal"
    basis: Literal["weight", "random", "universal", "gradient", "activation"] = "weight"
    weight_from: Literal["top", "bottom", "random"] = "top"
    universal_mode: Literal["residual", "replace"] = "residual"
    target_modules: list[str] | None = Field(default=None, description="None: every linear layer but the head")
    amplitude_dropout: float = Field(default=0.0, ge=0, lt=1)
    basis_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: the model's, if it can be"
    )
    store_basis: bool = False
    save_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="of the trained numbers in the file; the run scores what the file holds"
    )
    steps: int = Field(default=120, ge=1)
    batch_size: int = Field(default=8, ge=1, description="rows a step")
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        default="auto", description="peak of a linear schedule with 5% warm-up"
    )
    max_length: int = Field(default=512, ge=2, description="tokens a row; longer ones are cut, and counted")
    limit: int | None = Field(default=None, ge=1, description="rows to train on, None: all")
    heldout: float = Field(default=0.1, gt=0, description="share of the rows held out (whole number: how many)")
    eval_rows: int = Field(default=100, ge=1, description="held-out rows that are scored before and after")
    samples: int = Field(default=4, ge=0, description="generations shown before and after")
    max_new_tokens: int = Field(default=64, ge=1)
    calibration_rows: int = Field(default=32, ge=1, description="training rows for basis gradient and activation")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)

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


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A Recipe, or one CTError that names every wrong field."""
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise CTError(f"the recipe is wrong: {wrong_fields(error, values)}.") from None


def read_recipe(path: Path) -> Recipe:
    """The recipe in the JSON file `path`; CTError where there is none of this version."""
    values = read_json(path)
    try:
        return make_recipe(values if isinstance(values, dict) else {"recipe": values})
    except CTError as error:
        raise CTError(f"{path} is not from this ctsft: {error}") from None
