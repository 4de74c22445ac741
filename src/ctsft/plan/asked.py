"""What `ctsft plan` and `ctsft compare` are both asked: the model and the rows, as `ctsft tune` takes them."""

import dataclasses
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from ctsft.choices import ModelDtype
from ctsft.tune.recipe import MOST, Count, Recipe, as_tuned, make_recipe


@dataclass
class Asked:
    """The fields that both have; a question adds its own."""

    model: str = as_tuned("model")
    data: str = as_tuned("data")
    prompt_column: str | None = as_tuned("prompt_column")
    completion_column: str | None = as_tuned("completion_column")
    limit: Count | None = as_tuned("limit")
    heldout: Annotated[float, Field(gt=0, le=MOST)] = as_tuned("heldout")
    max_length: Annotated[int, Field(ge=2, le=MOST)] = as_tuned("max_length")
    dtype: ModelDtype = as_tuned("dtype")

    def tuned(self) -> dict[str, Any]:
        """The fields that mean the same in a recipe, in its order; `basis` does not."""
        own = {field.name for field in dataclasses.fields(self)} - {"basis"}
        return {name: getattr(self, name) for name in Recipe.__dataclass_fields__ if name in own}

    def recipe(self, **changes: Any) -> Recipe:
        """The recipe of a training with this model and these rows, and `changes`; else its adapter means nothing."""
        return make_recipe(self.tuned() | changes)
