"""Adapters in a bare transformers model: its own `load_adapter` reads those of CT-SFT, too.

transformers loads an adapter's tensors by the names of the model's parameters, and a CT-SFT file holds one flat tensor:
by itself it would report all of it as unexpected, and run without the adapter.
"""

import inspect
from pathlib import Path
from typing import Any

from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers.utils.peft_utils import find_adapter_config_file

from ctsft.adapter.config import CTSFT, CTConfig
from ctsft.adapter.seal import plain
from ctsft.adapter.swap import WHERE, hotswap
from ctsft.compat import adapter_is_in, loaded_whole
from ctsft.errors import CTError
from ctsft.files import read_json


def load_adapter(theirs: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `model.load_adapter` does: `theirs`, transformers' own method, unless it is an adapter of CT-SFT.

    Raises CTError for an adapter that does not fit (see `read.unpack`), and for a name that is taken.
    """
    given = inspect.signature(theirs).bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    load_config = given.get("load_config")
    source = given.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
    told = (getattr(load_config, "download_kwargs", None) or {}) | (given.get("adapter_kwargs") or {}) | given
    where = {name: told[name] for name in WHERE if name in told}
    config = given.get("peft_config")
    if config is None and source is not None:
        file = find_adapter_config_file(source, **where)
        settings = {} if file is None else read_json(Path(file))
        if not isinstance(settings, dict):
            raise CTError(f"{file} is no JSON object; it is damaged, take the adapter's folder anew.")
        if settings.get("peft_type") == CTSFT:
            config = CTConfig.from_pretrained(source, **where)
    if not isinstance(config, CTConfig):
        return theirs(*args, **kwargs)

    name, trainable = given.get("adapter_name") or "default", given.get("is_trainable", False)
    if given.get("hotswap", "auto") is True and source is not None:
        hotswap(model, str(source), name)
        return loaded_whole(model, trainable)
    if adapter_is_in(model, name):
        raise CTError(f"the model has an adapter {name!r}; give another name, or delete it first (delete_adapter).")
    tensors = given.get("adapter_state_dict")
    if tensors is None:
        tensors = load_peft_weights(str(source), device=str(model.device), **where)
    config.inference_mode = not trainable
    inject_adapter_in_model(config, model, name)
    set_peft_model_state_dict(model, {plain(n): tensor for n, tensor in tensors.items()}, name)
    return loaded_whole(model, trainable)
