"""Export: the same adapter in the forms that other programs read, an ordinary LoRA or a merged model."""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ctsft.adapter.layer import CTEmbedding, CTLayer
from ctsft.adapter.store import replace_folder
from ctsft.compat import unwrapped
from ctsft.errors import CTError
from ctsft.spectral.weights import clean_name

VLLM_LARGEST_RANK = 512


def export_adapter(
    model: PeftModel,
    folder: str | Path,
    to: Literal["lora", "merged"],
    adapter_name: str = "default",
    tokenizer: Any = None,
) -> list[str]:
    """Write adapter `adapter_name` of `model` to `folder`; returns notes that its user should read.

    `lora`: exact, `lora_A = Vh_K`, `lora_B = U_K C` (of `gains` diag(b) U_K diag(a)), zero-padded to one rank r, scale
    1 (`lora_alpha = r`): peft, vLLM and llama.cpp read the same numbers. `merged`: the whole model with W + dW in its
    own dtype; `model` is consumed.
    The folder appears whole or not at all. Raises CTError when `folder` exists, or for a LoRA of
    universal_mode='replace', whose dW has full rank.
    """
    if to not in ("lora", "merged"):
        raise CTError(f"to={to!r} is unknown; choose lora or merged.")
    folder = Path(folder)
    if folder.exists():
        raise CTError(f"{folder} exists; choose another place or remove it.")
    layers = {
        clean_name(n): m
        for n, m in model.named_modules()
        if isinstance(m, CTLayer) and adapter_name in m.ctsft_coefficients
    }
    if not layers:
        raise CTError(f"the model has no CT-SFT adapter {adapter_name!r} to export.")
    if to == "lora" and any(m.replaces(adapter_name) for m in layers.values()):
        raise CTError(
            "universal_mode='replace' puts another matrix in the place of W, so dW has full rank; export it with "
            "--to merged."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        new = Path(work) / "new"
        new.mkdir()
        if to == "lora":
            notes = write_lora(model, layers, new, adapter_name)
        else:
            notes = []
            model.unmerge_adapter()  # of others too
            model.set_adapter(adapter_name)  # its modules_to_save
            merged: Any = model.merge_and_unload(safe_merge=True, adapter_names=[adapter_name])
            merged.save_pretrained(new, state_dict={unwrapped(n): t for n, t in merged.state_dict().items()})
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        replace_folder(new, folder)
    return notes


def write_lora(model: PeftModel, layers: dict[str, CTLayer], folder: Path, adapter_name: str) -> list[str]:
    """adapter_model.safetensors and adapter_config.json of the equal LoRA, in float32."""
    r = max(m.ready(adapter_name).k for m in layers.values())
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        name = f"base_model.model.{name}"
        left, right = (f.detach().cpu() for f in layer.factors(adapter_name))
        b, a = left.new_zeros(left.shape[0], r), right.new_zeros(r, right.shape[1])
        b[:, : left.shape[1]], a[: right.shape[0]] = left, right
        if isinstance(layer, CTEmbedding):
            tensors |= {f"{name}.lora_embedding_A": b.T.contiguous(), f"{name}.lora_embedding_B": a.T.contiguous()}
        else:
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    whole = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors |= {k: v.contiguous() for k, v in whole.items() if not k.startswith("ctsft.")}  # modules_to_save

    old: Any = model.peft_config[adapter_name]
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=short_names(model, list(layers)),
        fan_in_fan_out=any(isinstance(m.get_base_layer(), Conv1D) for m in layers.values()),
        modules_to_save=old.modules_to_save,
        task_type=old.task_type or TaskType.CAUSAL_LM,
        base_model_name_or_path=old.base_model_name_or_path,
        inference_mode=True,
    )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n")

    notes = []
    if r > VLLM_LARGEST_RANK:
        notes.append(f"rank {r}: vLLM takes adapters up to rank {VLLM_LARGEST_RANK}.")
    if any(isinstance(m, CTEmbedding) for m in layers.values()):
        notes.append("the embedding is adapted: peft reads it; vLLM and llama.cpp read LoRA on linear layers only.")
    if any(m.ctsft_owner for m in layers.values()):
        notes.append(
            "the embedding is tied to the head: peft would merge this LoRA twice; use --to merged to merge it."
        )
    return notes


def short_names(model: PeftModel, names: list[str]) -> list[str]:
    """The last parts of `names`, as servers expect them, where they select just these modules; else the full names."""
    ends = {n.rpartition(".")[2] for n in names}
    selected = {clean_name(n) for n, _ in model.named_modules() if n.rpartition(".")[2] in ends}
    return sorted(ends) if selected == set(names) else sorted(names)


def largest_logit_difference(logits: Tensor, other: torch.nn.Module, input_ids: Tensor) -> float:
    """Largest absolute difference between `logits` (b, t, vocabulary) and those of `other` over `input_ids` (b, t)."""
    with torch.no_grad():
        return float((logits.float() - other(input_ids).logits.float()).abs().max())
