"""What calibration reads from data: of every matrix its mean gradient, or the Gram matrix of its inputs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ctsft.errors import CTError
from ctsft.spectral.weights import matrix


@contextmanager
def still(model: nn.Module, *wanted: Tensor) -> Iterator[None]:
    """Evaluation mode and gradients for `wanted` only; then every module's mode and every flag is as it was."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in (*model.parameters(), *wanted)]
    try:
        model.requires_grad_(False).eval()
        for tensor in wanted:
            tensor.requires_grad_(True)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p, trains in flags:
            p.requires_grad_(trains)


def mean_gradients(
    model: nn.Module, modules: dict[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Mean over `batches` of dL/dW (d_out, d_in), float32, L the batch's mean loss in nats per token."""
    count = 0
    total = {n: torch.zeros_like(matrix(m), dtype=torch.float32) for n, m in modules.items()}
    weights = [cast(Tensor, m.weight) for m in modules.values()]
    with still(model, *weights):
        for batch in batches:
            loss = model(**{"labels": own_labels(batch), **batch}).loss
            if not torch.isfinite(loss):
                raise CTError("the loss on a calibration batch is not finite; look for empty rows or damaged weights.")
            count += 1
            for (name, module), g in zip(
                modules.items(), torch.autograd.grad(loss, weights, allow_unused=True), strict=True
            ):
                if g is not None:
                    total[name] += matrix(module, g)
    if not count:
        raise CTError("calibration got no batches; give at least one.")
    return {n: checked_finite(n, t / count) for n, t in total.items()}


def own_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Every token of `batch` as a label, padding left out."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch["input_ids"].masked_fill(mask == 0, -100)


def input_grams(
    model: nn.Module, modules: dict[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """sum x x^T (d_in, d_in), float32, over the inputs x of every module in all `batches` (padding left out)."""
    for name, module in modules.items():
        if isinstance(module, nn.Embedding):
            raise CTError(
                f"{name} is an embedding, whose inputs are token ids; basis='activation' fits Linear and Conv1D only."
            )
    grams = {n: torch.zeros(matrix(m).shape[1], matrix(m).shape[1]) for n, m in modules.items()}
    keep: Tensor | None = None

    def hook(name: str) -> object:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            x = (x[keep] if keep is not None and x.shape[:2] == keep.shape else x.flatten(0, -2)).float()
            grams[name] += (x.T @ x).cpu()

        return add

    count = 0
    handles = [m.register_forward_pre_hook(hook(n)) for n, m in modules.items()]  # type: ignore[arg-type]
    try:
        with still(model), torch.no_grad():
            for batch in batches:
                keep = batch["attention_mask"].bool() if "attention_mask" in batch else None
                model(**{k: v for k, v in batch.items() if k != "labels"})
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise CTError("calibration got no batches; give at least one.")
    return {n: checked_finite(n, g) for n, g in grams.items()}


def checked_finite(name: str, t: Tensor) -> Tensor:
    if not torch.isfinite(t).all():
        raise CTError(
            f"calibration gave NaN or infinite values for {name}; use a base in bfloat16 or float32 and look at the "
            "data."
        )
    if not t.any():
        raise CTError(
            f"calibration gave nothing at all for {name}: its gradient or input is zero; leave it out of "
            "target_modules."
        )
    return t
