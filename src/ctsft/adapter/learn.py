"""Directions learned from siblings: tasks like those to come, trained jointly on one U and Vh that all of them share.

Sibling s sees dW = U diag(a_s) Vh in every matrix, with amplitudes a_s of its own. What is left is a file of directions
along which amplitudes alone serve a new sibling (basis='learned').
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ctsft.adapter.bases import check_k
from ctsft.adapter.config import CTConfig
from ctsft.adapter.learned import FACTS, Facts, Learned, Sibling
from ctsft.adapter.loss import logits_at, predicted, shared, summed_loss
from ctsft.adapter.seal import hash_tensors
from ctsft.adapter.store import base_fingerprint
from ctsft.adapter.targets import find_targets
from ctsft.compat import uncompiled
from ctsft.errors import CTError
from ctsft.files import replacing
from ctsft.progress import watched
from ctsft.spectral.basis import generator
from ctsft.spectral.collect import own_labels, still
from ctsft.spectral.weights import clean_name, matrix

Batch = Mapping[str, Tensor]  # input_ids (b, t), and what else the model takes
FEWEST = 4  # directions that a step of nested learning takes at least
SAVE_EVERY = 20.0  # seconds between states of an unfinished learning


class Joint:
    """U and Vh (of unit length at the start, seeded) and amplitudes of all siblings (zero) beside a frozen model.

    u, vh, a: by clean name of a target (d_out, K), (K, d_in) and (S, K), float32, which train. Within `beside`, the
    model adds U diag(a_s) Vh x to the output of every target, s the sibling of the row.
    """

    def __init__(self, model: nn.Module, config: CTConfig, siblings: int, seed: int) -> None:
        self.model = uncompiled(model)
        self.targets, self.owners = targets_of(self.model, config)
        self.modules = {clean_name(n): m for n, m in self.model.named_modules()}
        self.uses = {name: name for name in self.targets} | self.owners
        self.base = base_fingerprint(self.model, config, self.targets)
        self.u, self.vh, self.a = {}, {}, {}
        for name, module in self.targets.items():
            w, k = matrix(module), config.k_for(name)
            v, u = (
                F.normalize(torch.randn(k, d, generator=generator(seed, "learn", name, side)), dim=1)
                for side, d in (("vh", w.shape[1]), ("u", w.shape[0]))
            )
            parts = (u.T.contiguous(), v, torch.zeros(siblings, k))
            self.u[name], self.vh[name], self.a[name] = (p.to(w.device).requires_grad_() for p in parts)
        self.most = max(len(vh) for vh in self.vh.values())
        self.rows, self.tokens, self.first = torch.zeros(0), torch.Size(), self.most  # of the batch that is seen

    def delta(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        """What is added to the output of `module`, which uses the weight of the target `name`, for its input `x`."""
        k = min(self.first, len(self.vh[name]))
        u, vh, a = self.u[name][:, :k], self.vh[name][:k], self.a[name][self.rows, :k]
        embeds = isinstance(module, nn.Embedding)
        z = F.embedding(x, u) if embeds else F.linear(x, vh.to(x.dtype)).to(vh.dtype)
        if len(a) == 1:  # of one sibling, whichever tokens they are
            z = z * a[0]
        elif z.shape[:-1] == self.tokens:
            z = z * a[:, None]
        elif z.ndim == 2 and len(z) == self.tokens.numel():  # the rows one behind the other
            z = z * a.repeat_interleave(self.tokens[1], 0)
        else:
            raise CTError(
                f"{name} does not see its input row by row, so nobody knows to which sibling it belongs; leave it out "
                "of target_modules."
            )
        return z @ vh * getattr(module, "embed_scale", 1.0) if embeds else F.linear(z.to(x.dtype), u.to(x.dtype))

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Around all passes: the model is frozen, in eval mode, and adds what `delta` says. It is left as it was."""

        def hook(target: str) -> Any:
            return lambda module, args, out: (out + self.delta(target, module, args[0])).to(out.dtype)

        handles = [self.modules[use].register_forward_hook(hook(target)) for use, target in self.uses.items()]
        try:
            with still(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, parts: list[tuple[int, Batch]], first: int | None = None) -> Tensor:
        """Mean loss, nats per token, over batches, each with the index of its sibling; of each matrix' directions only
        the `first` count (None: all).

        Batches whose rows begin alike run one after the other, their beginnings once; else all rows run together.
        """
        device = next(iter(self.a.values())).device
        self.first = first or self.most
        parts = [(index, {n: t.to(device) for n, t in batch.items()}) for index, batch in parts]
        if not all("labels" in batch and shared(self.model, batch) for _, batch in parts):
            together, rows = joined(parts)
            self.rows, self.tokens = rows.to(device), together["input_ids"].shape
            inputs = {n: t for n, t in together.items() if n != "labels"} | {"use_cache": False}
            targets = predicted(together["labels"])
            chosen, head = targets != -100, self.model.get_output_embeddings()
            adapted = any(self.modules[use] is head for use in self.uses)  # then it has to see whole rows
            logits = self.model(**inputs).logits[chosen] if adapted else logits_at(self.model, inputs, chosen)
            return F.cross_entropy(logits.float(), targets[chosen])
        sums = []
        for index, batch in parts:
            self.rows = torch.tensor([index], device=device)
            sums.append(summed_loss(self.model, batch))
        losses, counts = zip(*sums, strict=True)
        return torch.stack(losses).sum() / torch.stack(counts).sum()

    def learned(self, sizes: list[int], facts: Facts) -> Learned:
        """The directions with their lengths in the amplitudes; those that all siblings use most come first, among those
        that count for the same `sizes`."""
        found = Learned({}, {}, {}, facts)
        for name in self.targets:
            u, vh, a = (part[name].detach().cpu() for part in (self.u, self.vh, self.a))
            a = a * (u.norm(dim=0) * vh.norm(dim=1))
            within = torch.bucketize(torch.arange(len(vh)), torch.tensor(sorted(sizes)), right=True)
            by_size = a.square().sum(0).argsort(descending=True, stable=True)
            order = by_size[within[by_size].argsort(stable=True)]
            found.u[name] = F.normalize(u[:, order], dim=0).contiguous()
            found.vh[name], found.siblings[name] = F.normalize(vh[order], dim=1), a[:, order].contiguous()
        return found


def targets_of(model: nn.Module, config: CTConfig) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """As `find_targets`; CTError where a target has fewer directions than asked for."""
    targets, owners = find_targets(model, config)
    for name, module in targets.items():
        check_k(config, name, matrix(module), config.k_for(name))
    return targets, owners


def joined(parts: list[tuple[int, Batch]]) -> tuple[dict[str, Tensor], Tensor]:
    """Batches below each other, padded on the right to one length, and the index of the sibling of every row (b,).

    Every batch has input_ids (b, t), and what else all of them have; labels are all tokens where there are none.
    """
    whole = [{"attention_mask": torch.ones_like(b["input_ids"]), "labels": own_labels(b)} | dict(b) for _, b in parts]
    t = max(b["input_ids"].shape[1] for b in whole)
    batch = {
        name: torch.cat(
            [F.pad(b[name], (0, t - b[name].shape[1]), value=-100 if name == "labels" else 0) for b in whole]
        )
        for name in set.intersection(*map(set, whole))
    }
    rows = torch.cat([torch.full((len(b["input_ids"]),), index) for index, b in parts])
    return batch, rows


def learn_basis(
    model: nn.Module,
    siblings: Mapping[str, Iterable[Batch]],
    k: int | dict[str, int] = 64,
    *,
    steps: int = 320,
    batches: int = 4,
    heldout: Mapping[str, Iterable[Batch]] | None = None,
    target_modules: list[str] | str | None = None,
    rates: tuple[float, float] = (0.002, 0.02),
    nested: bool = False,
    seed: int = 0,
    keep: str | Path | None = None,
    file: IO[str] | None = None,
) -> Learned:
    """Learn `k` directions of every target of the bare `model` from `siblings`, name -> model inputs (b, t).

    Every step sees `batches` batches, of the siblings in turn (an Iterable that can be read again is; an iterator must
    be long enough), and moves U, Vh and the amplitudes of those siblings by Adam with the two `rates`. With `nested`
    each step counts on the first k, k/2, k/4 ... directions only, by chance, so that the first few serve alone too, at
    some cost to all of them. The model is left as it was. `heldout`: batches for the losses before and after.

    The state is written to `keep` now and then; where that is there, learning goes on from it to the same bits. `file`
    gets the progress. Save the result, and give basis='learned', basis_file=folder. Raises CTError for no siblings, one
    without batches, a loss that is not finite, a `keep` of another learning, and whatever CTConfig and the model's
    modules do not allow.
    """
    if not siblings or steps < 1 or batches < 1:
        raise CTError("there is nothing to learn from; give at least one sibling, one step and one batch a step.")
    names = list(siblings)
    joint = Joint(model, CTConfig(k=k, basis="random", target_modules=target_modules), len(names), seed)
    sizes = ladder(joint.most) if nested else [joint.most]
    model_name = str(getattr(getattr(joint.model, "config", None), "_name_or_path", ""))
    whose = [Sibling(name) for name in names]
    facts = Facts(whose, joint.base, model_name, k, steps, batches, list(rates), nested, seed)
    state = State(joint, facts)
    path = None if keep is None else Path(keep)
    with joint.beside(), watched(text="learning", total=steps, file=file) as shown:
        if path is not None and path.exists():
            state.read(path)
        else:
            state.score("before", heldout or {})
        draw, saved = turns(siblings, batches, seed, state.step), time.monotonic()
        shown.update(state.step)
        for step in range(state.step, steps):
            first = sizes[int(torch.randint(len(sizes), (), generator=generator(seed, "size", step)))]
            loss = state.advance(next(draw), first)
            shown.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            shown.update()
            if path is not None and time.monotonic() - saved > SAVE_EVERY:
                state.write(path)
                saved = time.monotonic()
        state.score("after", heldout or {})
    return joint.learned(sizes, state.so_far())


def ladder(k: int) -> list[int]:
    """k, k/2, k/4 ... down to FEWEST."""
    return [k, *ladder(k // 2)] if k // 2 >= FEWEST else [k]


def turns(
    siblings: Mapping[str, Iterable[Batch]], batches: int, seed: int, done: int
) -> Iterator[list[tuple[int, Batch]]]:
    """The batches of every step after the first `done` steps, with the index of their sibling: all have their turn in
    every round, in an order of its own."""

    def endless(name: str) -> Iterator[Batch]:
        while True:
            some = False
            for batch in siblings[name]:
                some = True
                yield batch
            if not some:
                raise CTError(f"sibling {name!r} has no batches left; give a list, or an iterator that does not end.")

    def order() -> Iterator[int]:
        round_ = 0
        while True:
            yield from torch.randperm(len(siblings), generator=generator(seed, "turns", round_)).tolist()
            round_ += 1

    streams, whose, step = [endless(name) for name in siblings], order(), 0
    while True:
        found = [(index, next(streams[index])) for index in (next(whose) for _ in range(batches))]
        if step >= done:
            yield found
        step += 1


@dataclass
class State:
    """Learning after `step` steps."""

    joint: Joint
    facts: Facts
    step: int = 0

    def __post_init__(self) -> None:
        sides, amplitudes = self.facts.rates
        self.optimizer = torch.optim.Adam(
            [
                {"params": [*self.joint.u.values(), *self.joint.vh.values()], "lr": sides},
                {"params": [*self.joint.a.values()], "lr": amplitudes},
            ]
        )
        self.began = time.monotonic()

    def advance(self, parts: list[tuple[int, Batch]], first: int) -> float:
        """One step on batches of siblings and the `first` directions; returns its loss."""
        loss = self.joint.loss(parts, first)
        if not math.isfinite(value := loss.item()):
            raise CTError(f"the loss is {value} at step {self.step}; learn with smaller rates, or look at the data.")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for index, batch in parts:
            sibling = self.facts.siblings[index]
            sibling.rows, sibling.tokens = sibling.rows + len(batch["input_ids"]), sibling.tokens + counted(batch)
        self.step += 1
        return value

    def score(self, when: str, heldout: Mapping[str, Iterable[Batch]]) -> None:
        """Note the loss of every sibling that has `heldout` batches as its `before` or `after`."""
        for index, sibling in enumerate(self.facts.siblings):
            total, tokens = 0.0, 0
            for batch in heldout.get(sibling.name, ()):
                with torch.no_grad():
                    total += float(self.joint.loss([(index, batch)])) * counted(batch)
                tokens += counted(batch)
            if not math.isfinite(total):
                raise CTError(f"the held-out loss of {sibling.name!r} is {total}; look at its rows.")
            setattr(sibling, when, total / tokens if tokens else None)

    def so_far(self) -> Facts:
        """The facts with the seconds up to now."""
        return replace(self.facts, seconds=self.facts.seconds + time.monotonic() - self.began)

    def tensors(self) -> dict[str, Tensor]:
        """All numbers by name: what trains, and what the optimizer keeps of it."""
        found: dict[str, Tensor] = {}
        for part in ("u", "vh", "a"):
            for name, p in getattr(self.joint, part).items():
                kept = self.optimizer.state.get(p, {})
                found |= {f"{name}.{part}": p.detach()} | {f"{name}.{part}.{n}": t for n, t in kept.items()}
        return found

    def write(self, path: Path) -> None:
        """Put the state into `path`, whole or not at all."""
        tensors = {name: t.contiguous() for name, t in self.tensors().items()}
        notes = {"step": self.step, "facts": asdict(self.so_far()), "hash": hash_tensors(tensors)}
        with replacing(path) as scratch:
            save_file(tensors, scratch, {FACTS: json.dumps(notes)})

    def read(self, path: Path) -> None:
        """Go on from the state in `path`; CTError where it is damaged, or of a learning from other things."""
        try:
            with safe_open(path, "pt") as file:
                notes = json.loads((file.metadata() or {})[FACTS])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = TypeAdapter(Facts).validate_python(notes["facts"])
            whole = notes["hash"] == hash_tensors(tensors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise CTError(f"{path} is damaged; delete it to learn from the start.")
        if known(facts) != known(self.facts):
            raise CTError(f"{path} was left by a learning from other siblings, weights or options; delete it.")
        self.step, self.facts.siblings, self.facts.seconds = int(notes["step"]), facts.siblings, facts.seconds
        for part in ("u", "vh", "a"):
            for name, p in getattr(self.joint, part).items():
                own = f"{name}.{part}"
                p.data.copy_(tensors[own])
                kept = {n.removeprefix(f"{own}."): t for n, t in tensors.items() if n.startswith(f"{own}.")}
                if kept:
                    self.optimizer.state[p] = {n: t.to(p.device) if t.ndim else t for n, t in kept.items()}


def known(facts: Facts) -> dict[str, Any]:
    """What decides a learning, of its facts."""
    return asdict(facts) | {"siblings": [one.name for one in facts.siblings], "seconds": 0.0}


def counted(batch: Batch) -> int:
    """The tokens of `batch` that something predicts."""
    return int((batch.get("labels", own_labels(batch))[:, 1:] != -100).sum())
