"""What `ctsft tune` trains where no K is given: what a plan says, or K = 64 where training ends too soon for one."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ctsft.errors import CTError
from ctsft.pages.words import duration
from ctsft.plan.arms import candidate
from ctsft.plan.choose import USUAL
from ctsft.plan.plan import BACK, answered, directions, own_arms, seconds_a_row
from ctsft.plan.question import FIELDS, make_question
from ctsft.plan.told import Plan
from ctsft.plan.trial import narrowest
from ctsft.tune.material import Material, gathered
from ctsft.tune.recipe import ADAPTER, Recipe, make_recipe
from ctsft.tune.run import adapter_config

WORTH = 300.0  # seconds of training; below it a plan's minute need not come back (docs/planning.md)
PLANNED = {"k", "form", "basis", "basis_file", "basis_dtype", "save_dtype", "store_basis", "seed"}


@dataclass(frozen=True)
class Chosen:
    """What to train. found: what was loaded to tell, to train on; why: why there is no plan, if so."""

    recipe: Recipe
    plan: Plan | None = None
    found: Material | None = None
    why: str = ""


def automatic(recipe: Recipe, console: Console, form: bool, always: bool) -> Chosen:
    """`recipe` with the K that a plan recommends and, unless `form` (it was given), its form.

    Planned is what trains for `WORTH` seconds or more, or `always`; else K is `USUAL`. Raises CTError where the
    recipe has options that plans know nothing of, if `always`.
    """
    other = [n for n in ADAPTER if n not in PLANNED and getattr(recipe, n) != Recipe.__dataclass_fields__[n].default]
    other += ["basis_file"] if recipe.basis == "file" else []
    if other and always:
        raise CTError(f"--k auto tries adapters without {', '.join(other)}; leave that out, or give a number for --k.")
    found = gathered(recipe, console)
    seconds = recipe.steps * recipe.batch_size * BACK * seconds_a_row(found)
    if other or not (always or seconds >= WORTH):
        recipe = make_recipe(recipe.values() | {"k": unplanned(recipe, found.loaded.model)})
        short = f"training takes about {duration(seconds)}, too little to plan for (--k auto does)"
        why = f"plans know nothing of {', '.join(other)}" if other else short
        return Chosen(recipe, found=found, why=f"K is {recipe.k}: {why}")
    where = "" if recipe.basis == "random" else f"@{recipe.basis_file or recipe.basis}"
    arms = [name + where for name in ((recipe.form,) if form else own_arms(found.loaded.model))]
    asked = {n: v for n, v in recipe.values().items() if n in FIELDS and n != "basis"}
    plan = answered(make_question(asked | {"arms": arms}), console, found)
    option = plan.chosen
    assert option  # without a budget one always fits
    arm = candidate(option.candidate)
    values = {"k": arm.k, "form": arm.method} | ({"lr": option.rate} if option.again and recipe.lr == "auto" else {})
    return Chosen(make_recipe(recipe.values() | values), plan, found)


def unplanned(recipe: Recipe, model: Any) -> int:
    """The K of a recipe without a plan: 64, or all directions that there are if they are fewer."""
    learned = directions(recipe.basis_file) if recipe.basis == "learned" and recipe.basis_file else USUAL
    return min(USUAL, narrowest(model, adapter_config(recipe, model.dtype)), learned)
