"""Private names of peft, transformers, torch, TRL and CPython: all that can be gathered, one function each.

tests/test_compat.py says for each what breaks when it changes, and lists what ctsft overrides in the classes of others.
Libraries are imported where they are asked for: `import ctsft` itself asks here, and costs nothing.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig, PeftType
    from torch import Tensor, nn

FSDP, COMPILED = "_fsdp_wrapped_module.", "_orig_mod."  # what torch puts into the names of modules that it wraps


# ---- CPython


def being_imported(module: object) -> bool:
    """Whether Python is still running the file of `module`."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


# ---- peft


def add_peft_type(name: str) -> "PeftType":
    """Add `name` to peft's enum of methods: a plain string breaks transformers' add_adapter, Trainer and mixed mode."""
    from peft import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def linear_names(model: "nn.Module", config: "PeftConfig") -> set[str]:
    """The names of all linear layers of `model` but its head, as peft's "all-linear" finds them for `config`."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    asking: Any = copy.copy(config)
    asking.target_modules = "all-linear"
    _maybe_include_all_linear_layers(asking, model)
    return set(asking.target_modules)


def shortest_names(names: Collection[str], others: Collection[str]) -> list[str]:
    """Fewest endings, sorted, that select all of `names` and none of `others`."""
    from peft.tuners.tuners_utils import _find_minimal_target_modules

    return sorted(_find_minimal_target_modules(set(names), set(others))) if names else []


def selects(config: "PeftConfig", name: str) -> Any:
    """Whether `config` targets the module `name`: by a regex, a name's end, layer indices, and what is excluded.

    What it gives is true or false; peft tells by its kind whether a module that is not targeted was excluded.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    return check_target_module_exists(config, name)


def embed_scale(layer: Any) -> "Tensor | float":
    """The factor that the embedding under peft's `layer` puts on its output (Gemma's do), float32; else 1."""
    scale = layer._get_embed_scale()
    return 1.0 if scale is None else scale.float()


def keep_names_of(tensor: str) -> None:
    """Let peft read files that hold `tensor` although a key_mapping is given: it renames weights of the base, of which
    these files name none. The mapping is the user's, or one that the model brings; peft refuses names of another kind.
    """
    import peft.peft_model as home
    import wrapt

    def reading(theirs: Any, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return theirs(*args, **kwargs)
        except ValueError:
            found = theirs(*args, **kwargs | {"key_mapping": None}) if kwargs.get("key_mapping") else {}
            if tensor not in found:
                raise
            return found

    if not isinstance(home.load_peft_weights, wrapt.FunctionWrapper):
        wrapt.wrap_function_wrapper(home, "load_peft_weights", reading)


# ---- transformers


def read_adapters_by(bare: Any, onto: Any) -> None:
    """Put wrappers as of the package wrapt around the method load_adapter: `bare` of all transformers models, `onto` of
    peft's models."""
    import wrapt
    from peft import PeftModel
    from transformers.integrations.peft import PeftAdapterMixin

    for home, ours in ((PeftAdapterMixin, bare), (PeftModel, onto)):
        if not isinstance(vars(home)["load_adapter"], wrapt.FunctionWrapper):
            wrapt.wrap_function_wrapper(home, "load_adapter", ours)


def adapter_is_in(model: Any, name: str) -> bool:
    """Whether the bare transformers `model` has an adapter `name`."""
    return bool(model._hf_peft_config_loaded) and name in model.peft_config


def loaded_whole(model: Any, trainable: bool) -> Any:
    """Leave the bare transformers `model` as its load_adapter does, and give what that gives: nothing was amiss."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.utils.loading_report import LoadStateDictInfo

    model._hf_peft_config_loaded = True
    if not trainable:
        model.eval()
        for module in (m for m in model.modules() if isinstance(m, BaseTunerLayer)):
            module.requires_grad_(False)  # type: ignore[attr-defined]
    return LoadStateDictInfo(set(), set(), set(), [], {}, set())


# ---- torch


def does_more(module: "nn.Module") -> bool:
    """Whether a call of `module` is more than the forward of its class: hooks, its own or global, or a new forward."""
    from torch.nn.modules.module import _has_any_global_hook

    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or "forward" in vars(module) or _has_any_global_hook()


def under_functorch() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp ...) is at work."""
    import torch

    return torch._C._are_functorch_transforms_active()


def uncompiled(model: Any) -> Any:
    """The module that torch.compile wrapped as `model`, else `model` itself: its names have no wrapper in them."""
    return getattr(model, COMPILED.rstrip("."), model)


def unwrapped(name: str) -> str:
    """The name of a module without what FSDP and torch.compile put into it."""
    return name.replace(FSDP, "").replace(COMPILED, "")


# ---- TRL


@contextmanager
def plain_head(model: Any) -> Iterator[None]:
    """Around the making of TRL's SFTTrainer for the PeftModel `model`: its forward and head are left as they are.

    TRL refuses an adapted head, and puts a forward with a loss of its own into the bare model; a trainer that computes
    its loss itself needs neither.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    bare = model.get_base_model()
    head = bare.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        bare.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        for name in ("get_output_embeddings", "forward"):
            vars(bare).pop(name, None)


def count_tokens(trainer: Any, tokens: int) -> None:
    """Add `tokens` to what TRL's SFTTrainer logs as num_tokens: a loss of one's own skips its count."""
    trainer._total_train_tokens += tokens
    trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]
