"""Peers: LoRA, VeRA and the vectors of a model, beside our own forms, all counted and weighed by one rule."""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import ctsft.adapter.model  # noqa: F401  (registers the method with peft)
from ctsft.adapter.store import adapted

PEERS = ("lora", "vera")


@dataclass(frozen=True)
class Base:
    """A bare model as it is before anything is added: its parameters, and the bytes of its buffers."""

    parameters: frozenset[nn.Parameter]
    buffer_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> "Base":
        return cls(frozenset(model.parameters()), buffer_bytes(model))


@dataclass(frozen=True)
class Trained:
    """A model set to train something, and nothing else; `base`: as it was bare."""

    model: nn.Module
    base: Base = field(repr=False)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """All that trains, a shared parameter once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def trained(self) -> int:
        """How many numbers train, as the model stands."""
        return sum(p.numel() for p in self.trainable)

    @property
    def memory_bytes(self) -> int:
        """Bytes in memory beside the bare model and for what trains: frozen bases and trained numbers.

        Shared storage counts once. Gradients and the optimizer's state are not in it.
        """
        tensors: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad or p not in self.base.parameters]
        for _, layer in adapted(self.model, "default"):
            tensors += layer.ready("default").tensors().values()
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        return sum(storages.values()) + buffer_bytes(self.model) - self.base.buffer_bytes

    def adapter_bytes(self) -> int:
        """Bytes of the safetensors file that holds the adapter, or what trained of the bare model; really written.

        peft writes the frozen random factor of `lora-fa` too; `vera` stores its seed for both of its own. A diverged
        adapter weighs as much as any: zeros stand in for numbers that are not finite.
        """
        broken = {p: p.data for p in self.trainable if not p.isfinite().all()}
        try:
            for p in broken:
                p.data = torch.zeros_like(p)
            with tempfile.TemporaryDirectory() as folder:
                if hasattr(self.model, "peft_config"):
                    save: Callable[..., None] = self.model.save_pretrained  # type: ignore[assignment]
                    save(folder, save_embedding_layers=False)
                else:
                    changed = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
                    save_file(changed, Path(folder) / "changed.safetensors")
                return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        finally:
            for p, data in broken.items():
                p.data = data


def buffer_bytes(model: nn.Module) -> int:
    return sum(b.nbytes for b in model.buffers())


def vectors(model: nn.Module) -> list[nn.Parameter]:
    """The norm gains and all biases of the bare `model`."""
    return [p for p in model.parameters() if p.ndim == 1]


def train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let `parameters` of `model` train, and nothing else."""
    model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)


def common(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """What every config of peft says of its targets, the modules `names` of `model`."""
    turned = any(isinstance(model.get_submodule(n), Conv1D) for n in names)
    return {"target_modules": list(names), "task_type": "CAUSAL_LM", "fan_in_fan_out": turned}


def peer_config(model: nn.Module, method: str, k: int, seed: int, names: Sequence[str]) -> PeftConfig:
    """peft's config of `lora` or `vera` at rank `k` on the modules `names`, at scale 1: the rate is tuned instead."""
    if method == "lora":
        return LoraConfig(r=k, lora_alpha=k, **common(model, names))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save vera_A and vera_B")
        return VeraConfig(r=k, projection_prng_key=seed, save_projection=False, **common(model, names))


def wrap(model: Any, config: PeftConfig, seed: int) -> Any:
    """`model` with a fresh adapter, a PeftModel; what it draws at random comes from `seed`."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # see lab's share_with_head
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft sets it right for each module
        return get_peft_model(model, config)
