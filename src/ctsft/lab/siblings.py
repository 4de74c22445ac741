"""Directions that an arm learns from sibling texts: every way to learn them, at one cost, kept on disk.

Every way sees equally many windows of every sibling, drawn by that sibling's own seed, so that nothing random which
they might share makes them look alike. What was learned serves all rates and seeds of an arm. A text may be its own
only sibling: a warm-up.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctsft.adapter.learn import learn_basis
from ctsft.adapter.learned import Facts, Learned, Sibling
from ctsft.errors import CTError
from ctsft.files import home, replacing
from ctsft.lab.methods import equip, targets
from ctsft.lab.sources import autocast, fresh_model, inputs, streams, text_source, weights_of, windows
from ctsft.lab.spec import Spec, replaced
from ctsft.spectral.cache import key_of
from ctsft.spectral.kinds import LEARNED
from ctsft.spectral.weights import clean_name, fingerprint, matrix

VERSION = 1  # of what is learned: a change raises it, and all is learned anew
SEED = 2000  # of the first sibling, each next one has the next; no run has such a seed
RATES = (0.002, 0.02)  # of joint training: directions, amplitudes
LORA_RANK, LORA_RATE = 16, 0.005  # of the siblings' own LoRAs
Found = tuple[Tensor, Tensor, Tensor]  # u (d_out, K), vh (K, d_in), the siblings' amplitudes (S, K)
Factors = dict[str, list[Tensor]]  # by module: dW (d_out, d_in) of every sibling


def directions(spec: Spec) -> tuple[Path, dict[str, float]]:
    """The folder of the directions that `spec` names, as `basis_file` takes it, and what learning them cost.

    The cost: tokens, seconds, and bytes of the file. CTError where a sibling's text is not on this machine.
    """
    if not spec.siblings:
        raise CTError("directions are learned from siblings: name their texts in the arm's `siblings`.")
    folder = kept(deciding(spec))
    learned = Learned.read(folder)
    tokens = sum(sibling.tokens for sibling in learned.facts.siblings)
    cost = {"tokens": tokens, "seconds": learned.facts.seconds, "bytes": (folder / LEARNED).stat().st_size}
    if spec.shuffled or spec.strength != 1:
        folder /= f"{spec.strength:g}{'-shuffled' if spec.shuffled else ''}"
        for name, a in learned.siblings.items():
            learned.siblings[name] = a * spec.strength
            if spec.shuffled:
                learned.u[name] = learned.u[name].roll(1, 1)
        learned.save(folder)
    return folder, cost


def merge_mean(model: nn.Module, folder: Path) -> None:
    """Add the mean of the siblings' dW, as the directions in `folder` hold it, to the weights of the bare `model`."""
    learned = Learned.read(folder)
    with torch.no_grad():
        for name, module in model.named_modules():
            if (own := clean_name(name)) in learned.u:
                matrix(module).add_((learned.u[own] * learned.siblings[own].mean(0)) @ learned.vh[own])


# ------------------------------------------------------------------------------------------------- what is kept


def deciding(spec: Spec) -> Spec:
    """`spec` with nothing but what decides the directions."""
    same = ["model", "weights", "siblings", "learning", "learned_steps", "learned_batch", "learned_pace"]
    same += ["targets", "length", "dtype"]
    return Spec(text=spec.siblings[0], learned_k=spec.learned_k or spec.k, **{n: getattr(spec, n) for n in same})


def kept(what: Spec) -> Path:
    """The folder in which the directions of `what` (see `deciding`) lie; they are learned if they do not lie there."""
    folder = place("directions", what)
    with FileLock(f"{folder}.lock"):
        if not (folder / LEARNED).exists():
            started = time.perf_counter()
            learned = LEARNINGS[what.learning](what)
            learned.facts.seconds = round(time.perf_counter() - started, 1)
            learned.save(folder)
    return folder


def place(kind: str, what: Spec) -> Path:
    """Where what `what` and the bytes of its siblings' texts decide lies in the cache folder."""
    texts = [Path(text_source(name)) for name in what.siblings]
    hashes = [xxhash.xxh3_128_hexdigest(path.read_bytes()) if path.is_file() else path for path in texts]
    key = key_of("siblings", VERSION, kind, what.key, weights_of(what.model), *hashes)
    folder = home() / "siblings"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / xxhash.xxh3_128_hexdigest(key.encode())


# -------------------------------------------------------------------------------------------- ways of learning


def feed(what: Spec, i: int, rows: int) -> Iterator[dict[str, Tensor]]:
    """Batches of `rows` windows of sibling `i`, endless."""
    ids, _ = streams(what.model, what.siblings[i])
    own, step = replaced(what, batch=rows, seed=SEED + i), 0
    while True:
        yield inputs(windows(ids, own, "learn", step))
        step += 1


def share(what: Spec) -> int:
    """Windows that every sibling has for `what`."""
    return what.learned_steps * (what.learned_batch or len(what.siblings)) // len(what.siblings)


def jointly(what: Spec, nested: bool = False, fixed: bool = False) -> Learned:
    """U and Vh trained on all siblings at once, with amplitudes of each its own; `fixed`: as drawn, the amplitudes
    alone train."""
    model = fresh_model(what)
    feeds = {name: feed(what, i, 1) for i, name in enumerate(what.siblings)}
    sides, amplitudes = RATES
    with autocast(what):
        return learn_basis(
            model,
            feeds,
            what.learned_k,
            steps=what.learned_steps,
            batches=what.learned_batch or len(feeds),
            target_modules=list(targets(model, what)),
            rates=(0.0 if fixed else sides * what.learned_pace, amplitudes * what.learned_pace),
            nested=nested,
            seed=SEED,
        )


def loras(what: Spec) -> Factors:
    """dW of a LoRA of rank LORA_RANK tuned to each sibling alone: as many windows as joint training gives it."""
    plain = replaced(what, learning="pairs", learned_k=LORA_RANK)
    path = place("loras", plain).with_suffix(".safetensors")
    with FileLock(f"{path}.lock"):
        if not path.exists():
            found = [lora(plain, i) for i in range(len(plain.siblings))]
            with replacing(path) as scratch:
                save_file({f"{i}.{n}": w.contiguous() for i, one in enumerate(found) for n, w in one.items()}, scratch)
    tensors = load_file(path)
    names = [key[2:] for key in tensors if key.startswith("0.")]
    return {name: [tensors[f"{i}.{name}"] for i in range(len(what.siblings))] for name in names}


def lora(what: Spec, i: int) -> dict[str, Tensor]:
    """dW by module of a LoRA tuned to sibling `i`."""
    rows, seed = len(what.siblings), SEED + i
    equipped = equip(fresh_model(what), replaced(what, method="lora", k=LORA_RANK, seed=seed, siblings=()), [])
    batches, steps = feed(what, i, rows), share(what) // rows
    optimizer = torch.optim.Adam(equipped.trainable, lr=LORA_RATE)
    equipped.model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LORA_RATE * (1 - step / steps)
        with autocast(what):
            loss = equipped.model(**next(batches), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = {clean_name(n): m for n, m in equipped.model.named_modules() if isinstance(m, LoraLayer)}
    return {name: dense(layer).detach() for name, layer in layers.items()}


def dense(layer: Any) -> Tensor:
    """dW (d_out, d_in) of a LoRA's layer."""
    delta: Tensor = layer.get_delta_weight("default")
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


def from_loras(find: Callable[[list[Tensor], int], Found]) -> Callable[[Spec], Learned]:
    """The way of learning that takes the directions of a matrix from its siblings' dW by `find`."""

    def learn(what: Spec) -> Learned:
        model = fresh_model(what)
        u, vh, amplitudes = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for name, deltas in loras(what).items():
            found = find([w.double() for w in deltas], what.learned_k)
            u[name], vh[name], amplitudes[name] = (part.float() for part in found)
        seen = share(what) * (what.length - 1)  # tokens that something predicts, as joint training counts them
        facts = Facts(
            siblings=[Sibling(name, tokens=seen) for name in what.siblings],
            base=fingerprint((n, matrix(m)) for n, m in targets(model, what).items()),
            model=what.model,
            k=what.learned_k,
            steps=what.learned_steps,
            batches=len(what.siblings),
            rates=[LORA_RATE, LORA_RATE],
            nested=False,
            seed=SEED,
        )
        return Learned(u, vh, amplitudes, facts)

    return learn


def leading(w: Tensor, k: int) -> Found:
    """The first `k` singular triples of `w`."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :k], vh[:k], s[:k]


def pairs(deltas: list[Tensor], k: int) -> Found:
    """Equally many leading pairs of every sibling's dW: the first of each, then the second of each, and so on.

    A sibling has amplitudes along its own pairs alone; with all of its pairs, they are its dW.
    """
    count = k // len(deltas)
    if k % len(deltas) or count > LORA_RANK:
        raise CTError(f"{k} pairs cannot be shared by {len(deltas)} siblings of {LORA_RANK} pairs each; change k.")
    u, vh, s = zip(*(leading(w, count) for w in deltas), strict=True)
    own = torch.stack([torch.diag(row) for row in torch.stack(s, 1)], 1)  # (siblings, pairs, siblings)
    return torch.stack(u, 2).flatten(1), torch.stack(vh, 1).flatten(0, 1), own.flatten(1)


def of_mean(deltas: list[Tensor], k: int) -> Found:
    """The leading pairs of the mean dW."""
    u, vh, _ = leading(torch.stack(deltas).mean(0), k)
    return u, vh, along(deltas, u, vh)


def hosvd(deltas: list[Tensor], k: int) -> Found:
    """The leading directions of all siblings' outputs, and of their inputs, each side for itself (Tucker's factors)."""
    u, vh = leading(torch.cat(deltas, 1), k)[0], leading(torch.cat(deltas, 0), k)[1]
    return u, vh, along(deltas, u, vh)


def along(deltas: list[Tensor], u: Tensor, vh: Tensor) -> Tensor:
    """u' dW v of every sibling and pair, (S, K)."""
    return torch.stack([torch.einsum("ok,oi,ki->k", u, w, vh) for w in deltas])


LEARNINGS: dict[str, Callable[[Spec], Learned]] = {
    "joint": jointly,
    "nested": lambda what: jointly(what, nested=True),
    "fixed": lambda what: jointly(what, fixed=True),
    "pairs": from_loras(pairs),
    "mean": from_loras(of_mean),
    "hosvd": from_loras(hosvd),
}
