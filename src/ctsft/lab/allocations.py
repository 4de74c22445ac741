"""Where to spend: at one total, how many directions every matrix gets, and which matrices get any.

An allocation is one entry of ALLOCATIONS: weights by name, of all adapted matrices or of a few, from the model and
batches of its text. K goes in proportion to them, at the total of `k` for every matrix; see `allocate` for bounds and
remainders. Where few are chosen that cannot hold the total, they get all that they have, and less is trained.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import Tensor, nn

from ctsft.adapter.learned import Learned
from ctsft.errors import CTError
from ctsft.spectral.collect import mean_gradients
from ctsft.spectral.decompose import effective_rank, singular_values
from ctsft.spectral.weights import clean_name, matrix

FEEDFORWARD = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING | {"photonic_gpt": ["mlp.down"]}
Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Asked:
    """What an allocation is made from: modules by name, `k` a matrix in the mean, model inputs, learned directions."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    k: int
    batches: list[Mapping[str, Tensor]]
    learned: Path | None = None

    def gradients(self) -> dict[str, Tensor]:
        """dL/dW (d_out, d_in) of every matrix, in the mean of the batches."""
        return mean_gradients(self.model, dict(self.modules), self.batches)


Weights = Callable[[Asked], dict[str, float]]


# ------------------------------------------------------------------------------------------------- how much of a total


def ranks(asked: Asked) -> dict[str, float]:
    """Effective rank of the mean gradient (paper 84)."""
    return {n: effective_rank(singular_values(g)) for n, g in asked.gradients().items()}


def captured(asked: Asked) -> dict[str, float]:
    """What a random direction captures of the mean gradient's energy, in expectation: |G|^2 / (d_out d_in)."""
    return {n: float(g.square().mean()) for n, g in asked.gradients().items()}


def slope(asked: Asked) -> dict[str, float]:
    """The root of `captured`: what a small step of Adam gains along a random direction. Half as steep."""
    return {n: e**0.5 for n, e in captured(asked).items()}


def fisher(asked: Asked) -> dict[str, float]:
    """Mean squared entry of the gradient of one batch, over the batches: noise counts as well."""
    each = [captured(replace(asked, batches=[batch])) for batch in asked.batches]
    return {n: sum(one[n] for one in each) / len(each) for n in asked.modules}


def importance(asked: Asked) -> dict[str, float]:
    """Mean of |W G| over the entries, G the mean gradient (GoRA)."""
    return {n: float((matrix(asked.modules[n]).detach() * g).abs().mean()) for n, g in asked.gradients().items()}


# ---------------------------------------------------------------------------------------------- which matrices at all


def attention(asked: Asked) -> dict[str, float]:
    """All matrices of attention, alike."""
    found = [n for n in asked.modules if "attn" in n.lower() or "attention" in n.lower()]
    if not found:
        raise CTError("no adapted matrix has attn or attention in its name, so allocation='attention' has none.")
    return dict.fromkeys(found, 1.0)


def down(asked: Asked) -> dict[str, float]:
    """All down-projections of the MLPs, alike."""
    kind = str(asked.model.config.model_type)  # type: ignore[union-attr]
    found = [n for n in asked.modules if n.endswith(tuple(FEEDFORWARD.get(kind, ())))]
    if kind not in FEEDFORWARD or not found:
        raise CTError(f"no adapted matrix of this {kind} model is known as a down-projection; see FEEDFORWARD.")
    return dict.fromkeys(found, 1.0)


def one_down(asked: Asked) -> dict[str, float]:
    """Of the down-projections in the first half of the blocks the one of most gradient energy, alone (PAGE)."""
    every = list(down(asked))
    found = captured(replace(asked, modules={n: asked.modules[n] for n in every[: (len(every) + 1) // 2]}))
    return {max(found, key=lambda n: found[n]): 1.0}


# ----------------------------------------------------------------------------------------------------------- the table


def in_proportion(weights: Weights) -> Callable[[Asked], dict[str, int]]:
    """K in proportion to `weights`, at the total of `asked.k` for all matrices."""

    def split(asked: Asked) -> dict[str, int]:
        found, total = weights(asked), asked.k * len(asked.modules)
        limits = [min(matrix(asked.modules[n]).shape) for n in found]
        if len(found) < len(asked.modules):
            total = min(total, sum(limits))
        return dict(zip(found, allocate(list(found.values()), total, limits), strict=True))

    return split


def by_use(asked: Asked) -> dict[str, int]:
    """K per matrix so that of all learned directions those remain which siblings use most, `k` each in the mean.

    Use is the mean square of the siblings' amplitudes; a file has the most used of a matrix first. Each keeps one.
    """
    if asked.learned is None:
        raise CTError("allocation='energy' goes by how siblings use learned directions; it needs basis='learned'.")
    amplitudes, k = Learned.read(asked.learned).siblings, asked.k
    use = {name: amplitudes[clean_name(name)].square().mean(0) for name in asked.modules}
    rest, more = torch.cat([e[1:] for e in use.values()]), (k - 1) * len(use)
    if more > len(rest):
        raise CTError(f"allocation='energy' keeps k={k} in the mean of fewer learned directions; learn more of them.")
    least = float(rest.sort(descending=True).values[more - 1]) if more else torch.inf
    return {name: 1 + int((e[1:] >= least).sum()) for name, e in use.items()}


ALLOCATIONS: dict[str, Callable[[Asked], dict[str, int]]] = {
    "uniform": lambda asked: dict.fromkeys(asked.modules, asked.k),
    "effective_rank": in_proportion(ranks),
    "energy": by_use,
    "gradient": in_proportion(captured),
    "slope": in_proportion(slope),
    "fisher": in_proportion(fisher),
    "gora": in_proportion(importance),
    "attention": in_proportion(attention),
    "down": in_proportion(down),
    "one_down": in_proportion(one_down),
}


def allocate(weights: Sequence[float], total: int, limits: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to `weights`, each at least 1 and at most its limit.

    What is left after rounding down goes to the largest remainders. Raises CTError where the bounds leave no room.
    """
    if not len(limits) <= total <= sum(limits):
        raise CTError(
            f"{total} directions do not fit {len(limits)} matrices that take 1 to {max(limits)} each; change k."
        )

    def shares(scale: float) -> list[float]:
        return [min(max(scale * w, 1.0), limit) for w, limit in zip(weights, limits, strict=True)]

    weights = [max(w, 1e-12 * max(weights)) or 1.0 for w in weights]  # none is zero, so that every limit can be reached
    low, high = 0.0, max(limit / w for w, limit in zip(weights, limits, strict=True))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) < total else (low, middle)
    exact = shares(high)
    whole = [int(share) for share in exact]
    largest = sorted(range(len(whole)), key=lambda i: whole[i] - exact[i])
    for i in largest[: total - sum(whole)]:
        whole[i] += 1
    return whole
