"""The bases of an adapter's targets: another adapter's where they are the same, the kept ones, or made anew."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctsft.adapter.config import CTConfig
from ctsft.adapter.forms import FORMS
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.store import base_fingerprint, check_same_base, note_other_ends, uncovered_ends
from ctsft.adapter.targets import find_targets
from ctsft.errors import CTError
from ctsft.progress import watched
from ctsft.spectral.basis import Basis, paired, replacing
from ctsft.spectral.cache import keeps_bases, key_of, read_bases, write_bases
from ctsft.spectral.decompose import one_thread
from ctsft.spectral.kinds import Make, kind_of
from ctsft.spectral.weights import clean_name, matrix

WORTH_KEEPING = 1.0  # seconds of work (estimated) from which bases are kept on disk


@dataclass
class Prepared:
    """All that adding an adapter needs, made and checked before the model is touched. Keyed by clean name."""

    k: dict[str, int]
    bases: dict[str, Basis | None]  # None: to be read from the adapter's file
    owners: dict[str, str]  # second uses of a tied weight -> the use that owns the adapter
    fingerprint: str  # of the base weights that the adapter was made on


def prepare(model: nn.Module, config: CTConfig) -> Prepared:
    """Find the targets of `config` in `model` and make their bases. Raises CTError before anything has changed."""
    if any(isinstance(m, CTLayer) and m.merged for m in model.modules()):
        raise CTError(
            "an adapter is merged into these weights, so a new basis would be that of W + dW; unmerge it first."
        )
    targets, owners = find_targets(model, config)
    weights = {n: matrix(m) for n, m in targets.items()}
    now = base_fingerprint(model, config, targets)
    check_same_base(config, now)
    if not config.from_disk:
        config.uncovered_ends = uncovered_ends(model, config, targets)
    elif config.uncovered_ends and config.fingerprint == now:
        note_other_ends(config, uncovered_ends(model, config, targets))
    ks = {n: config.k_for(n) for n in targets}
    for name, w in weights.items():
        check_k(config, name, w, ks[name])
    if config.fingerprint is not None and config.stored_basis:
        return Prepared(ks, dict.fromkeys(targets), owners, config.fingerprint)
    return Prepared(ks, make_bases(model, config, weights, ks, now), owners, config.fingerprint or now)


def check_k(config: CTConfig, name: str, w: Tensor, k: int) -> None:
    """CTError when the matrix `w` (d_out, d_in) has fewer than `k` directions of the kind asked for."""
    limit = kind_of(config.basis).most(w.shape, FORMS[config.form].both)
    if k > limit:
        raise CTError(
            f"k={k} is more than the {limit} directions of {name} ({w.shape[0]} x {w.shape[1]}); lower k, or give a "
            f"mapping such as k={{'{name.rpartition('.')[2]}': {limit}, '.*': {k}}}."
        )


def make_bases(
    model: nn.Module, config: CTConfig, weights: dict[str, Tensor], ks: dict[str, int], now: str, but: str = ""
) -> dict[str, Basis | None]:
    """The basis of every target: another adapter's than `but` where it is the same, else the kept one, else made.

    The bits are those of a fresh computation wherever they come from. Matrices are decomposed side by side, each on one
    thread, so that the bits do not depend on the number of threads. `now`: fingerprint of the base weights.
    """
    both = FORMS[config.form].both
    modules = {clean_name(n): m for n, m in model.named_modules()}
    others = {n: other_bases(modules[n], config, now, but) for n in weights}
    bases: dict[str, Basis | None] = dict.fromkeys(weights)
    for name, w in weights.items():
        for other in others[name]:
            if reaches(config, w.shape, ks[name], other.k) and (other.both or not both):
                bases[name] = other.view(ks[name]) if both else other.view(ks[name]).one_side()
    missing = {n: w for n, w in weights.items() if bases[n] is None}
    if missing:
        bases |= computed(model, config, missing, ks, now)
    for name, w in weights.items():
        made = bases[name]
        # The larger K holds the numbers and the smaller one looks at its first: whichever adapter came first.
        for other in others[name]:
            if made is not None and other.k < made.k and reaches(config, w.shape, other.k, made.k):
                other.refer_to(made)
    return bases


def origin(config: CTConfig) -> tuple[object, ...]:
    """What decides the directions beside the weights and K."""
    return config.basis, *kind_of(config.basis).decided_by(config, FORMS[config.form].both)


def other_bases(layer: nn.Module, config: CTConfig, now: str, but: str) -> list[Basis]:
    """Bases of `layer` that adapters other than `but` made of the same origin and from the same base weights."""
    found: list[Basis] = []
    if not isinstance(layer, CTLayer) or kind_of(config.basis).stored:
        return found
    for name, basis in layer.ctsft_basis.items():
        theirs = layer.ctsft_config[name]
        here = not theirs.stored_basis  # one from a file may have been made elsewhere, with other last bits
        same = origin(theirs) == origin(config) and theirs.basis_dtype == config.basis_dtype
        if basis is not None and name != but and here and same and layer.ctsft_fingerprint[name] == now:
            found.append(basis)
    return found


def reaches(config: CTConfig, shape: torch.Size, k: int, found: int) -> bool:
    """Whether the first `k` of `found` directions have the bits of `k` computed alone."""
    return k == found or (k < found and kind_of(config.basis).nested(config, shape, k, found))


def computed(
    model: nn.Module, config: CTConfig, weights: dict[str, Tensor], ks: dict[str, int], now: str
) -> dict[str, Basis | None]:
    """Bases read from the cache folder, or made (and kept there, where they cost more than `WORTH_KEEPING`)."""
    kind = kind_of(config.basis)
    work = sum(kind.work(config, w.shape, ks[n]) for n, w in weights.items()) if kind.work else 0.0
    keep = kind.work is not None and work >= WORTH_KEEPING and keeps_bases()
    key = key_of(*origin(config), now)
    kept = read_bases(key) if keep else {}
    usable = (n for n, w in weights.items() if n in kept and reaches(config, w.shape, ks[n], kept[n].k))
    found = {n: kept[n].own(ks[n]) for n in usable}
    rest = [n for n in weights if n not in found]
    make, workers = maker(model, config, ks.values()) if rest else None, torch.get_num_threads()

    def both_ways(name: str) -> tuple[Basis, Basis]:  # as its kind makes it, which is kept, and as its form needs it
        basis = found[name] if make is None or name in found else make(name, weights[name], ks[name])
        return basis, fit(config, weights[name], basis)

    with one_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = pool.map(both_ways, weights)
        pairs = dict(zip(weights, watched(results, "basis", len(weights)), strict=True))
    larger = {n: pairs[n][0] for n in rest if n not in kept or kept[n].k < pairs[n][0].k}
    if keep and larger:
        write_bases(key, kept | larger)
    return {n: fitted for n, (_, fitted) in pairs.items()}


def maker(model: nn.Module, config: CTConfig, ks: Collection[int]) -> Make:
    """What makes the basis of one target, for the kind that `config` names."""
    kind, calibrated = kind_of(config.basis), config.calibrated
    if kind.maker is not None:
        return kind.maker(model, config, ks, FORMS[config.form].both)
    if calibrated is None:
        raise CTError(
            f"basis='{config.basis}' is made from data: call config = ctsft.calibrate(model, config, batches) before "
            "the adapter is added."
        )

    def from_data(name: str, w: Tensor, k: int) -> Basis:
        if name not in calibrated or calibrated[name].k < k:
            raise CTError(
                f"the config was calibrated without {k} directions for {name}; call ctsft.calibrate with this model "
                "and this k."
            )
        return calibrated[name].own(k)

    return from_data


def fit(config: CTConfig, w: Tensor, basis: Basis) -> Basis:
    """`basis` as the form of `config` needs it: with both sides or without the one that trains, and rounded."""
    if not FORMS[config.form].both:
        basis = basis.one_side()
    elif not basis.both:
        basis = paired(w, basis)
    if config.universal_mode == "replace":
        basis = replacing(w, basis)
    return basis.rounded(getattr(torch, config.basis_dtype))
