"""Kinds of basis: the one table of where an adapter's directions come from.

A new kind is one entry of KINDS, its name in `choices.BasisKind`, and tests. Nobody else asks which kind a basis is.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ctsft.choices import LEARNED, AdapterOptions
from ctsft.errors import CTError
from ctsft.spectral.basis import Basis, gradient_basis, input_basis, random_basis, two_sides, weight_basis
from ctsft.spectral.collect import input_grams, mean_gradients
from ctsft.spectral.decompose import iterated, principal_directions, seconds
from ctsft.spectral.weights import (
    clean_name,
    fingerprint,
    matrix,
    takes_part_transposed,
    universal_gram,
    universal_members,
    width,
)

Make = Callable[[str, Tensor, int], Basis]  # (module name, W (d_out, d_in), K) -> its directions

FACTS, SEAL = "ctsft", "seal"  # in the metadata of a learned file: how it was learned, as JSON; see `seal`
OFF = 0.01  # how far products and lengths of a file's directions may be off: bfloat16 rounds them by less

# The most directions of a matrix (d_out, d_in) by the sides that a kind has, for a form that needs one side only. Where
# both are needed, it is the smaller of d_out and d_in.
MOST: dict[str, Callable[[torch.Size], int]] = {
    "pairs": min,  # u and vh belong together, as singular vectors do
    "each": lambda shape: shape[1],  # u and vh are made independently
    "input": lambda shape: shape[1],  # vh only
    "either": max,  # vh or u, by which side of the matrix meets the residual stream
}


@dataclass(frozen=True)
class Calibration:
    """Directions from data: `collect` runs a model over batches, `make` turns what it found of a matrix into K of them.

    collect: (model, modules by name, batches) -> a tensor a module.
    """

    collect: Callable[[nn.Module, dict[str, nn.Module], Iterable[Mapping[str, Tensor]]], dict[str, Tensor]]
    make: Callable[[Tensor, int], Basis]


@dataclass(frozen=True)
class Kind:
    """One kind of basis. It has either a `maker`, or a `calibration` that must run before the adapter is added.

    sides: those that its makers give (see MOST). A form that needs the other side too gets it as the images under W.
    maker: (bare model, options, every K, both sides needed) -> Make; what all matrices share is prepared in this call.
    stored: whether an adapter's file must hold the directions, since nothing else brings them back.
    of_weights: whether they are made of the base weights, so that from other weights they would be others.
    shared: whether one set of directions, made of all matrices together, serves all of them.
    decided_by: (options, both sides needed) -> all that decides the directions beside base weights, K and the kind.
    nested: (options, shape, K, more) -> whether the first K of more directions have the bits of K made alone.
    work: (options, shape, K) -> seconds that making them takes, for a kind that is worth keeping on disk.
    """

    sides: Literal["pairs", "each", "input", "either"]
    maker: Callable[[nn.Module, AdapterOptions, Collection[int], bool], Make] | None = None
    calibration: Calibration | None = None
    stored: bool = False
    of_weights: bool = False
    shared: bool = False
    decided_by: Callable[[AdapterOptions, bool], tuple[object, ...]] = lambda *_: ()
    nested: Callable[[AdapterOptions, torch.Size, int, int], bool] = lambda *_: False
    work: Callable[[AdapterOptions, torch.Size, int], float] | None = None

    def most(self, shape: torch.Size, both: bool) -> int:
        """The most directions of a matrix of `shape` (d_out, d_in), where `both` sides are needed or one."""
        return min(shape) if both else MOST[self.sides](shape)


# ---- makers


def from_weight(model: nn.Module, options: AdapterOptions, ks: Collection[int], both: bool) -> Make:
    return lambda name, w, k: weight_basis(w, k, options.weight_from, options.seed, name)


def from_seed(model: nn.Module, options: AdapterOptions, ks: Collection[int], both: bool) -> Make:
    return lambda name, w, k: random_basis((w.shape[0], w.shape[1]), k, options.seed, name)


def from_stream(model: nn.Module, options: AdapterOptions, ks: Collection[int], both: bool) -> Make:
    d_model = width(model)
    if max(ks) > d_model:
        raise CTError(
            f"k={max(ks)} is more than the {d_model} directions of the residual stream that basis='universal' has."
        )
    shared = universal_directions(model, d_model)[: max(ks)]
    # Rounded here, once: every matrix then refers to this one tensor.
    sides = two_sides(shared.to(getattr(torch, options.basis_dtype)).contiguous(), ks)
    return lambda name, w, k: sides[k][takes_part_transposed(name, w.shape, d_model)]


LAST_UNIVERSAL: dict[str, Tensor] = {}


def universal_directions(model: nn.Module, d_model: int) -> Tensor:
    """All directions of the universal basis as rows, (d_model, d_model) float64. Those of the last model are kept.

    The fingerprint of the weights tells whether it is the same model: hashing is far cheaper than the Gram matrix.
    """
    members = universal_members(model, d_model)
    key = fingerprint((n, matrix(m)) for n, m in members.items())
    if key not in LAST_UNIVERSAL:
        made = principal_directions(universal_gram(members, d_model, "universal basis"), d_model)
        LAST_UNIVERSAL.clear()
        LAST_UNIVERSAL[key] = made
    return LAST_UNIVERSAL[key]


# ---- directions that lie in a user's file; `config` is a CTConfig, which belongs to a room above


@contextmanager
def basis_file(config: Any) -> Iterator[Any]:
    """The basis_file of `config`, open: looked up as given, then in the folder that the adapter was read from.

    Where a folder has that name, it is LEARNED in there.
    """
    places = [Path(config.basis_file).expanduser(), config.folder / config.basis_file]
    places += [config.folder / LEARNED] if config.from_disk else []
    path = next((p for place in places for p in (place, place / LEARNED) if p.is_file()), None)
    if path is None:
        told = " nor ".join(dict.fromkeys(map(str, places)))
        raise CTError(
            f"there is no basis_file {told}; give the safetensors file that the directions lie in (an adapter names it "
            "in its adapter_config.json, where its path may be changed)."
        )
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CTError(f"basis_file {path} cannot be read as safetensors ({error}).") from None


def content(config: Any) -> str:
    """The checksum of all that lies in the basis_file of `config`: names, shapes and values. CTError for damage."""
    with basis_file(config) as file:
        found = fingerprint((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118  (it is no mapping)
        check_seal(config.basis_file, file.metadata() or {}, found)
    return found


def seal(facts: str, values: str) -> str:
    """A 128-bit hash (xxh3) of a learned file's facts and of the fingerprint of its tensors; it lies in the file."""
    return f"xxh3-{xxhash.xxh3_128_hexdigest(f'{facts} {values}'.encode())}"


def check_seal(path: object, notes: Mapping[str, str], values: str) -> None:
    """CTError where the file `path` has a seal in its metadata `notes` that is of other facts or numbers."""
    if notes.get(SEAL) not in (None, seal(notes.get(FACTS, ""), values)):
        raise CTError(f"{path} is not as it was learned; it is damaged or was edited, take the file anew.")


def checksum_of(config: Any) -> str:
    """The checksum that `config` holds its basis_file to: of the file as first read, kept with the adapter on disk."""
    config.basis_checksum = config.basis_checksum or content(config)
    return str(config.basis_checksum)


def from_file(
    model: nn.Module, config: Any, ks: Collection[int], both: bool, check: Callable[[str, Tensor], None] | None = None
) -> Make:
    """`check` raises CTError where the rows (K, d), of the name it is told, are no directions; else: `orthonormal`."""
    if (found := content(config)) != checksum_of(config):
        raise CTError(
            f"basis_file {config.basis_file} holds {found} and the adapter was made with {config.basis_checksum}: its "
            "directions are others; give the file that it was made with."
        )

    def read(name: str, w: Tensor, k: int) -> Basis:
        shapes = {"u": (w.shape[0], k), "vh": (k, w.shape[1])}
        with basis_file(config) as file:
            own = clean_name(name)
            sides = [side for side in shapes if both or side == "vh"]
            factors = {s: directions(file, f"{own}.{s}", shapes[s], check or orthonormal) for s in sides}
            start = siblings(file, own, k).mean(0) if config.start == "mean" else None
        return Basis(factors.get("u"), factors["vh"], start)

    return read


def directions(file: Any, key: str, shape: tuple[int, int], check: Callable[[str, Tensor], None]) -> Tensor:
    """The first of the tensor `key`, up to `shape`, (d_out, K) for u and (K, d_in) for vh, float32.

    Raises CTError unless it is there, of these sizes, and holds directions that pass the `check`.
    """
    if key not in file.keys():  # noqa: SIM118
        raise CTError(f"basis_file has no {key}; adapt only modules that it has directions for, by target_modules.")
    there, along = tuple(file.get_slice(key).get_shape()), 1 if key.endswith(".u") else 0
    if len(there) != 2 or there[1 - along] != shape[1 - along] or there[along] < shape[along]:
        raise CTError(
            f"{key} in basis_file is {there}; this model and k={shape[along]} need {shape}, or more directions; lower "
            "k or give another file."
        )
    found: Tensor = file.get_slice(key)[: shape[0], : shape[1]]
    if not found.is_floating_point() or not torch.isfinite(found).all():
        raise CTError(
            f"{key} in basis_file has NaN, infinite or whole numbers ({found.dtype}); it holds no directions."
        )
    check(key, found.double() if along == 0 else found.double().T)
    # a copy, for what is read is a view of the file, which its owner may write anew
    return found.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def orthonormal(key: str, rows: Tensor) -> None:
    """CTError unless the `rows` (K, d) are."""
    away = float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max())
    if away > OFF:
        raise CTError(
            f"{key} in basis_file is not orthonormal: products of its directions are up to {away:.2g} off 0 and 1, and "
            f"at most {OFF} is taken; orthonormalise them (torch.linalg.qr)."
        )


def unit(key: str, rows: Tensor) -> None:
    """CTError unless the `rows` (K, d) have length 1; they need not be orthogonal."""
    away = float((rows.norm(dim=1) - 1).abs().max())
    if away > OFF:
        raise CTError(
            f"{key} in basis_file holds directions whose length is up to {away:.2g} off 1; the file is damaged, or for "
            "basis='file'."
        )


def siblings(file: Any, name: str, k: int) -> Tensor:
    """The first `k` amplitudes of every sibling (S, K) that the directions of the module `name` were learned from."""
    key = f"{name}.siblings"
    found: Tensor | None = file.get_tensor(key) if key in file.keys() else None  # noqa: SIM118
    if found is None or found.ndim != 2 or 0 in found.shape or found.shape[1] < k or not torch.isfinite(found).all():
        raise CTError(f"{key} in basis_file does not hold {k} amplitudes of every sibling; the file is damaged.")
    return found[:, :k].float()


# ---- the table


def same_iteration(options: AdapterOptions, shape: torch.Size, k: int, more: int) -> bool:
    """Leading directions are iterated in whole groups, the same whatever K; an exact decomposition rounds with K."""
    return options.weight_from == "top" and iterated(shape, k) and iterated(shape, more)


KINDS = {
    "weight": Kind(
        sides="pairs",
        maker=from_weight,
        of_weights=True,
        decided_by=lambda o, both: (o.weight_from, o.seed if o.weight_from == "random" else None),
        nested=same_iteration,
        work=lambda o, shape, k: seconds(shape, k, o.weight_from == "top"),
    ),
    "random": Kind(sides="each", maker=from_seed, decided_by=lambda o, both: (o.seed,)),
    "universal": Kind(
        sides="either",
        maker=from_stream,
        of_weights=True,
        shared=True,
        decided_by=lambda o, both: (both, o.universal_mode),
    ),
    "gradient": Kind(sides="pairs", calibration=Calibration(mean_gradients, gradient_basis), stored=True),
    "activation": Kind(sides="input", calibration=Calibration(input_grams, input_basis), stored=True),
    "file": Kind(  # the first K of a file are the same numbers whatever K, so that more may be shared as views
        sides="each", maker=from_file, decided_by=lambda o, both: (checksum_of(o),), nested=lambda *_: True
    ),
    "learned": Kind(  # by `ctsft.learn_basis`: of unit length, and not orthogonal
        sides="each",
        maker=partial(from_file, check=unit),
        decided_by=lambda o, both: (checksum_of(o), o.start),
        nested=lambda *_: True,
    ),
}


def kind_of(name: str) -> Kind:
    """The kind of basis called `name`, or CTError where there is none."""
    if name not in KINDS:
        raise CTError(f"basis={name!r} is unknown; choose one of {', '.join(KINDS)}.")
    return KINDS[name]


def needs_data(name: str) -> bool:
    """Whether directions of the kind `name` are made by `ctsft.calibrate`, from batches."""
    return kind_of(name).calibration is not None
