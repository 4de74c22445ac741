"""Arms: what one spec makes trainable in a model, our forms and every baseline, counted and weighed by the same rules.

All of them start at the base model exactly (`universal_mode="replace"` excepted), and with scale 1: the learning rate
is tuned for every arm, and a scale would only move it. What trains, per adapted matrix (d_out, d_in):

- `diagonal` K, `core` K^2, `scores` K d_out, `gains` K + d_out: our forms, see CTConfig.
- `tinylora`, `unilora`, `grouped`, `moved`, `with-norms`: K in the mean; `components`: K in the whole model; see
  lone.py.
- `lora` K (d_out + d_in): alpha = K. `lora-fa` K d_out: its random factor is frozen (Zhang et al. 2023).
- `lora-xs` K^2: dW = U_K S_K R Vh_K (Balazy et al. 2024); `core` with the singular values folded into U.
- `vera` K + d_out (Kopiczko et al. 2024). `ia3`: d_out, or d_in where it scales the MLP's inner activations (Liu et
  al. 2022).
- `full`: the matrix itself, no bias. `norms`: no matrix; all vectors of the model (norm gains and all biases).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config
from peft.tuners.lora import Embedding as LoraEmbedding
from torch import Tensor, nn

from ctsft.adapter.calibrate import calibrate
from ctsft.adapter.config import CTConfig
from ctsft.adapter.peers import PEERS, Base, Trained, common, peer_config, train_only, vectors, wrap
from ctsft.adapter.resize import resize
from ctsft.adapter.store import adapted, layers_of
from ctsft.adapter.targets import find_targets
from ctsft.choices import FORMS
from ctsft.errors import CTError
from ctsft.lab.allocations import ALLOCATIONS, FEEDFORWARD, Asked, Batches
from ctsft.lab.lone import LONE, attach
from ctsft.lab.schedule import counted_parameters
from ctsft.lab.spec import Spec
from ctsft.spectral.kinds import needs_data
from ctsft.spectral.weights import matrix

LORAS = ("lora", "lora-fa", "lora-xs")
REFRESHED = 10_000  # from the seed of directions to that of the next: no run has such a one
LINEAR_ONLY = ("ia3", "vera", *LONE)  # methods that know no embedding


@dataclass(frozen=True)
class Equipped(Trained):
    """A model with what `spec` trains, and nothing else, set to train.

    names, shapes: adapted matrices and their (d_out, d_in), in the model's order, a tied one once; none for `norms`.
    Methods that know no embedding leave it out.
    """

    spec: Spec
    names: list[str]
    shapes: list[tuple[int, int]]

    @property
    def ks(self) -> list[int]:
        """K of every adapted matrix as the model stands; empty for methods without a K of this meaning."""
        if self.spec.method in ("lora", "lora-fa"):
            return [self.spec.k] * len(self.shapes)
        return [layer.ready("default").k for _, layer in adapted(self.model, "default")]

    def counted(self, k: int | None = None) -> int | None:
        """K (d_out + d_in) over the matrices, which papers 81 and 82 call trainable; None for methods without a K.

        `k`: at that K in every matrix; None: at each matrix's K as it is.
        """
        if self.spec.method not in FORMS + LORAS:
            return None
        if k is not None:
            return counted_parameters(k, self.shapes)
        return sum(counted_parameters(k, [shape]) for k, shape in zip(self.ks, self.shapes, strict=True))


# ------------------------------------------------------------------------------------------------------------ targets


def targets(model: nn.Module, spec: Spec) -> dict[str, nn.Module]:
    """The modules that `spec` adapts in the bare transformers `model`, by name, in the model's order.

    `paper`: all linear matrices of the blocks and the token embedding, with it the head that is tied to it; `blocks`:
    without the embedding; `last2`: of the last two blocks; `last2+head`: these and the output head. IA3, VeRA, what is
    in LONE and the basis `activation` know no embedding and adapt the blocks alone; `norms` adapts no matrix, whatever
    the targets.
    """
    if spec.method == "norms":
        return {}
    found, _ = find_targets(model, CTConfig())
    names = set(found)
    if spec.targets.startswith("last2"):
        blocks = {n: int(number[1]) for n in found if (number := re.search(r"\.(\d+)\.", n))}
        names = {n for n, block in blocks.items() if block >= max(blocks.values()) - 1}
    extra = None
    if spec.targets == "last2+head":
        extra = model.get_output_embeddings()  # type: ignore[operator]
    elif spec.targets == "paper" and spec.method not in LINEAR_ONLY and not by_activation(spec):
        extra = model.get_input_embeddings()  # type: ignore[operator]
    return {n: m for n, m in model.named_modules() if n in names or m is extra}


def by_activation(spec: Spec) -> bool:
    return spec.method in FORMS and spec.basis == "activation"


def untie_head(model: nn.Module) -> None:
    """Give an output head that is tied to the embedding its own copy of the weight."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def shapes_of(modules: Mapping[str, nn.Module]) -> list[tuple[int, int]]:
    """(d_out, d_in) of every module."""
    return [(rows, columns) for rows, columns in (matrix(m).shape for m in modules.values())]


# ------------------------------------------------------------------------------------------------------------- equip


def equip(model: nn.Module, spec: Spec, batches: Batches, learned: Path | None = None) -> Equipped:
    """Make ready in `model`, a freshly loaded transformers causal language model, what `spec` trains.

    batches: model inputs, input_ids (b, t), for bases and allocations that are made from data. learned: the folder of
    directions that were learned from siblings, for that basis. With `last2+head` a tied
    head first gets its own copy of the embedding's weight, so that the embedding stays as it is. A tied head shares the
    adapter of its embedding, for LoRA as for ours. Randomness comes from `spec.seed`. Raises CTError for what the
    method cannot do.
    """
    if spec.method not in FORMS and (spec.dropout or spec.schedule or spec.refreshes or spec.allocation != "uniform"):
        raise CTError(
            f"{spec.method} has no dropout, schedule, refresh or allocation of K; only {', '.join(FORMS)} have."
        )
    if spec.method in (*FORMS, *LORAS, *LONE, "vera") and spec.k < 1:
        raise CTError(f"{spec.method} needs k of at least 1 and has k={spec.k}.")
    batches = list(batches)
    base = Base.of(model)
    if spec.targets == "last2+head" and spec.method != "norms":
        untie_head(model)
    modules = targets(model, spec)
    ks: dict[str, int] = {}
    if spec.allocation != "uniform":
        ks = ALLOCATIONS[spec.allocation](Asked(model, modules, spec.k, batches, learned))
        modules = {n: modules[n] for n in ks}
    names, shapes = list(modules), shapes_of(modules)
    if spec.method in ("full", "norms"):
        whole: Any = vectors(model) if spec.method == "norms" else [m.weight for m in modules.values()]
        train_only(model, whole)
        return Equipped(model, base, spec, names, shapes)

    if spec.method in LONE:
        basis = str(learned) if spec.basis == "learned" else spec.basis
        attach(model, modules, spec.method, spec.k, basis, spec.seed)
        return Equipped(model, base, spec, names, shapes)
    if spec.method in FORMS:
        config: Any = spectral_config(model, spec, modules, ks, batches, learned)
    elif spec.method == "lora-xs":
        config = CTConfig(k=spec.k, form="core", target_modules=names, task_type="CAUSAL_LM")
    else:
        config = peft_config(model, spec, modules)
    wrapped = wrap(model, config, spec.seed)
    if spec.method == "lora-xs":
        fold_singular_values(wrapped)
    if spec.method in ("lora", "lora-fa"):
        share_with_head(model)
    if spec.method == "lora-fa":
        for name, p in wrapped.named_parameters():
            if ".lora_A." in name or ".lora_embedding_B." in name:
                p.requires_grad_(False)
    return Equipped(wrapped, base, spec, names, shapes)


def spectral_config(
    model: nn.Module,
    spec: Spec,
    modules: Mapping[str, nn.Module],
    ks: Mapping[str, int],
    batches: Batches,
    learned: Path | None,
) -> CTConfig:
    """The adapter that `spec` describes, calibrated where its directions come from data; `ks`: K per matrix, if any."""
    if ks and spec.schedule:
        raise CTError(f"allocation={spec.allocation!r} gives every matrix its own K; it cannot follow a schedule.")
    if spec.refreshes and (spec.basis != "random" or spec.method == "gains" or spec.schedule):
        raise CTError("refreshes take new random directions: basis='random', no gains, no schedule.")
    config = CTConfig(
        k={re.escape(n): own for n, own in ks.items()} or spec.k,
        form=spec.method,  # type: ignore[arg-type]
        basis=spec.basis,
        basis_file=str(learned) if learned else None,
        start=spec.start,
        weight_from=spec.weight_from,
        universal_mode=spec.universal_mode,
        target_modules=list(modules),
        seed=spec.seed,
        amplitude_dropout=spec.dropout,
        task_type="CAUSAL_LM",
    )
    return calibrate(model, config, batches) if needs_data(spec.basis) else config


def peft_config(model: nn.Module, spec: Spec, modules: Mapping[str, nn.Module]) -> Any:
    """peft's own config of a baseline."""
    method = "lora" if spec.method == "lora-fa" else spec.method
    if method in PEERS:
        return peer_config(model, method, spec.k, spec.seed, list(modules))
    kind = str(model.config.model_type)  # type: ignore[union-attr]
    if kind not in FEEDFORWARD:
        raise CTError(f"peft names no feed-forward matrix of {kind} models for IA3; add it to FEEDFORWARD.")
    inner = [n for n in modules if n.endswith(tuple(FEEDFORWARD[kind]))]
    return IA3Config(feedforward_modules=inner, **common(model, list(modules)))


def fold_singular_values(wrapped: nn.Module) -> None:
    """U_K becomes U_K S_K in every layer of a `core` adapter on the weight basis: that is LoRA-XS."""
    for _, layer in adapted(wrapped, "default"):
        basis = layer.ready("default")
        assert basis.u is not None and basis.vh is not None
        basis.u = basis.u * torch.einsum("ok,oi,ki->k", basis.u, matrix(layer.get_base_layer()).float(), basis.vh)


def share_with_head(model: nn.Module) -> None:
    """Let a tied head use the LoRA of its embedding.

    peft ties only modules of certain names, and as two parameters of one storage, which Adam would step twice.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, LoraEmbedding) or embedding.get_base_layer().weight is not head.weight:
        return

    def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        a, b = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
        return out + (args[0].to(b.dtype) @ b @ a * embedding.scaling["default"]).to(out.dtype)

    head.register_forward_hook(add)


# ----------------------------------------------------------------------------------------------------------- refresh


@torch.no_grad()
def refresh(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fold what was learned into the weights, and take new random directions at zero; the optimizer's state is reset.

    The folded part is known by the seed of its directions and its trained numbers: so many more must be stored.
    """
    layers = layers_of(model)
    config = next(iter(layers.values())).ctsft_config["default"]
    for layer in layers.values():
        layer.get_base_layer().weight.add_(layer.get_delta_weight("default"))  # type: ignore[operator]
        layer.ctsft_coefficients["default"].zero_()
    config.seed += REFRESHED
    resize(model, config.k, optimizer=optimizer)
