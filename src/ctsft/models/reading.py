"""How a model is read with transformers: whole or not at all, quietly, and with one sentence for what goes wrong."""

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ctsft.errors import CTError
from ctsft.progress import waiting


def whole(*args: Any, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained`, which would fill weights that are missing with random ones; here that is an error."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        *args, **kwargs, trust_remote_code=False, output_loading_info=True
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} of the model's weights are missing, {missing[0]} first")
    return model


@contextlib.contextmanager
def one_sentence(source: Path | str) -> Iterator[None]:
    """Whatever the libraries raise while reading `source` becomes one CTError."""
    try:
        yield
    except CTError:
        raise
    except Exception as error:
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            what = "needs Python code of its own, which is never run: choose an architecture that transformers has."
        elif "for this kind of AutoModel" in str(error):
            what = "is not a causal language model."
        elif isinstance(error, SafetensorError):
            what = f"has a truncated or corrupt safetensors file ({reason}): fetch the folder again."
        elif isinstance(error, OSError) and isinstance(source, str):
            what = f"was not found on the hub ({reason}): check the name and the network, or give a local folder."
        else:
            what = f"cannot be loaded ({reason})."
        raise CTError(f"{source} {what}") from error


def first_line(error: Exception) -> str:
    """What an error says, as part of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(" .:")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' bars, logs and warnings; what matters in them is checked and raised by us."""
    levels = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])


@contextlib.contextmanager
def reading(source: Path | str) -> Iterator[None]:
    """Around all that the libraries read from `source`: `one_sentence`, `quiet`, and the time that a hub id takes."""
    hub = isinstance(source, str)
    told = waiting(Console(file=sys.stderr), f"{source}: asking the hub") if hub else contextlib.nullcontext()
    with told, one_sentence(source), quiet():
        yield
