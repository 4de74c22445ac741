"""The modules that an adapter changes: found by names, tied weights once, all checked before anything changes."""

import copy
from typing import Any

from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from ctsft.adapter.config import CTConfig
from ctsft.adapter.layer import CTLayer
from ctsft.choices import fits
from ctsft.compat import linear_names, selects, shortest_names
from ctsft.errors import CTError, told
from ctsft.spectral.weights import MATRIX_MODULES, checked, clean_name


def find_targets(model: nn.Module, config: CTConfig) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The bare modules that `config` matches, by clean name, and second uses of their (tied) weights, name -> first.

    Of modules that share a weight the first in the model's order is the target, whichever was named.
    """
    # Adapted layers stand for their base module, so that a second adapter finds the names that the first one found.
    inside = tuple(n + "." for n, m in model.named_modules() if isinstance(m, CTLayer))
    modules = {
        clean_name(n): m.base_layer if isinstance(m, CTLayer) else m
        for n, m in model.named_modules()
        if n and not n.startswith(inside)
    }
    if config.target_modules in (None, "all-linear"):
        names = {clean_name(n) for n in linear_names(model, config)}
        # written down as endings, not as "all-linear": an adapter must mean the same modules when it is loaded
        config.target_modules = shortest_names(names, set(modules) - names)
    found = [n for n in modules if choice(config, n)]
    regex = isinstance(config.target_modules, str)
    wanted = [str(config.target_modules)] if regex else sorted(config.target_modules)
    unknown = [w for w in wanted if not (found and (regex or matches(w, modules)))]
    if unknown and not found:
        free = copy.copy(config)
        free.exclude_modules = free.modules_to_save = free.layers_to_transform = free.layers_pattern = None
        if any(choice(free, n) for n in modules):
            raise CTError(
                f"of target_modules {told(wanted)} nothing is left: exclude_modules, modules_to_save or "
                "layers_to_transform leave all of them out."
            )
    if unknown or not found:
        there = sorted({n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, MATRIX_MODULES)})
        raise CTError(
            f"target_modules {told(unknown)} match nothing in {type(model).__name__}; it has {', '.join(there)}."
        )

    weights = {n: checked(n, modules[n]) for n in found}
    # A tied weight must have one adapter, else its uses would no longer be one matrix: all uses of each, in order.
    uses: dict[int, list[str]] = {id(modules[n].weight): [] for n in weights}
    for name, module in modules.items():
        if isinstance(module, MATRIX_MODULES) and id(module.weight) in uses:
            uses[id(module.weight)].append(name)
    owners = {name: names[0] for names in uses.values() for name in names[1:]}
    if config.from_disk and sorted(owners) != sorted(config.target_modules_to_tie or []):
        was = told(config.target_modules_to_tie) if config.target_modules_to_tie else "no module"
        raise CTError(
            f"the adapter was trained with {was} tied to a target and here it is {sorted(owners) or 'none'}; load the "
            "model with its weights tied as they were."
        )
    # Full names: peft would save the whole base embedding next to the bare name `lm_head` or `embed_tokens`.
    targets = {names[0]: modules[names[0]] for names in uses.values()}
    if owners or any(n.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for n in targets):
        config.target_modules = sorted(targets)
    config.target_modules_to_tie = sorted(owners) or None
    return {n: m for n, m in modules.items() if n in targets}, owners


def matches(wanted: str, modules: dict[str, nn.Module]) -> bool:
    return any(n == wanted or n.endswith(f".{wanted}") for n in modules)


def choice(config: CTConfig, name: str) -> Any:
    """peft's answer whether `config` targets the module `name`, but its regexes have a limit of time (see `fits`)."""
    plain: CTConfig = copy.copy(config)
    if isinstance(config.exclude_modules, str) and config.exclude_modules:
        plain.exclude_modules = [name] if fits(config.exclude_modules, name) else None
    if isinstance(config.target_modules, str):
        plain.target_modules = [name] if fits(config.target_modules, name) else []
    return selects(plain, name)
