"""Weights: the matrices inside a model, seen one way, and the fingerprint of their exact values.

Everywhere else a matrix is (d_out, d_in), y = W x, whatever module holds it; an embedding is (vocabulary, d_model) like
the head it may be tied to.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import xxhash
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ctsft.compat import unwrapped
from ctsft.errors import CTError
from ctsft.progress import watched
from ctsft.spectral.decompose import lower_gram, one_thread

MATRIX_MODULES = (nn.Linear, Conv1D, nn.Embedding)
WRITERS = ("o_proj", "out_proj", "c_proj", "down_proj", "fc2", "fc_out", "proj", "down", "wo", "dense_4h_to_h")
ROWS = 8192  # rows that are in memory as float64 at once
WHOLE = 1024  # a wider Gram matrix is made as a lower triangle,
BLOCK = 256  # at most so many of its rows at a time
WORKERS = 4  # products at a time; each holds ROWS rows and one Gram matrix in float64
CHUNK = 1 << 18  # numbers that are converted and hashed at a time: they stay in the processor's cache


def matrix(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight of a Linear, Conv1D or Embedding as a view (d_out, d_in); `weight` stands in for the module's own."""
    weight = module.weight if weight is None else weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight  # type: ignore[union-attr,return-value]


def clean_name(name: str) -> str:
    """A module's name in the bare model, whatever wraps it."""
    return unwrapped(name).removeprefix("base_model.model.")


def checked(name: str, module: nn.Module) -> Tensor:
    """The (d_out, d_in) weight of `module`, or CTError where no spectrum can be taken of it."""
    if not isinstance(module, MATRIX_MODULES):
        kind = type(module).__name__
        if kind in {known.__name__ for known in MATRIX_MODULES}:  # a quantised Linear has the name of torch's own
            kind = f"{type(module).__module__}.{kind}, not torch's own"
        raise CTError(
            f"{name} is a {kind}; CT-SFT adapts Linear, Conv1D and Embedding, so leave it out of target_modules."
        )
    weight = module.weight
    if weight.is_meta:
        raise CTError(f"{name} has its weight on the meta device; load the model's weights before adding the adapter.")
    if type(weight.data).__name__ == "DTensor" or weight.ndim != 2 or weight.numel() == 0:
        raise CTError(f"{name} holds a sharded or empty weight; gather it (or adapt before sharding) and try again.")
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise CTError(f"{name} is quantised ({weight.dtype}); load the model in bfloat16 or float32 to adapt it.")
    check_finite(name, weight.data)
    return matrix(module)


def check_finite(name: str, weight: Tensor) -> None:
    """CTError where `weight`, of any shape but empty, has a NaN or an infinite number."""
    with one_thread():  # it reads as fast as memory gives; where cores are busy, threads would wait for each other
        extremes = torch.aminmax(weight)
    if not all(extreme.isfinite() for extreme in extremes):  # a NaN anywhere is both extremes
        raise CTError(f"{name} has NaN or infinite weights; the checkpoint is damaged, use another one.")


def width(model: nn.Module) -> int:
    """d_model: the width of the residual stream, read from the input embedding."""
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # transformers, where it finds none
        embedding = None
    if embedding is None:
        raise CTError("basis='universal' needs a transformers model, whose input embedding tells the width d_model.")
    return int(embedding.weight.shape[1])


def takes_part_transposed(name: str, shape: torch.Size, d_model: int) -> bool:
    """Whether a matrix meets the residual stream with its output side (o_proj, down_proj) and not its input side.

    Raises CTError when neither side has width `d_model`.
    """
    d_out, d_in = shape
    if d_model not in (d_out, d_in):
        raise CTError(
            f"{name} ({d_out} x {d_in}) has no side of width d_model = {d_model}, so no universal basis fits it."
        )
    if d_out == d_in:
        return name.rpartition(".")[2] in WRITERS
    return d_out == d_model


def rows(name: str, w: Tensor, d_model: int) -> Tensor:
    """The rows (n, d_model) with which a matrix takes part in the universal basis."""
    return w.T if takes_part_transposed(name, w.shape, d_model) else w


def uses(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every Linear, Conv1D and Embedding of the bare model by clean name."""
    for name, module in model.named_modules():
        if isinstance(module, MATRIX_MODULES) and ".modules_to_save." not in name:
            yield clean_name(name).removesuffix(".base_layer").removesuffix(".original_module"), module


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those of `uses`, tied ones once."""
    seen: set[int] = set()
    for name, module in uses(model):
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield name, module


def ends(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of all embeddings and of the head, by clean name, where they lie here in one piece."""
    try:
        head = getattr(model, "get_output_embeddings", lambda: None)()
    except NotImplementedError:
        head = None
    last = next((clean_name(n) for n, m in model.named_modules() if m is head), None)
    for name, module in uses(model):
        weight = module.weight
        whole = type(weight.data).__name__ != "DTensor" and weight.ndim == 2 and not weight.is_meta
        if whole and (name == last or isinstance(module, nn.Embedding)):
            yield name, weight  # type: ignore[misc]


def universal_members(model: nn.Module, d_model: int) -> dict[str, nn.Module]:
    """The matrices whose rows make the universal basis: all that have a side of width `d_model`."""
    return {n: m for n, m in matrices(model) if d_model in m.weight.shape}  # type: ignore[operator]


def universal_gram(members: dict[str, nn.Module], d_model: int, bar: str | None = None) -> Tensor:
    """sum W^T W over the rows of all `members`, (d_model, d_model) float64 (paper 78: one basis for all).

    `bar` is the text of a progress bar, None for no bar. Raises CTError as `checked` and `takes_part_transposed` do.
    """
    shown = watched(members.items(), bar)
    return gram_of((p for n, m in shown for p in rows(n, checked(n, m), d_model).detach().split(ROWS)), d_model)


def gram_of(pieces: Iterable[Tensor], d_model: int) -> Tensor:
    """sum P^T P over `pieces`, each (n, d_model) with n <= ROWS, of any floating dtype: (d_model, d_model) float64.

    All of it in float64. Products are made side by side, each on one thread, and added in the order of the pieces: the
    bits do not depend on the number of threads, nor on where the pieces come from.
    """
    gram, waiting = torch.zeros(d_model, d_model, dtype=torch.float64), deque[Future[Tensor]]()
    workers = min(torch.get_num_threads(), WORKERS)
    with one_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for piece in pieces:
            waiting.append(pool.submit(lower_product, piece))
            if len(waiting) > workers:
                gram += waiting.popleft().result()
        while waiting:
            gram += waiting.popleft().result()
    return gram.tril() + gram.tril(-1).T


def lower_product(piece: Tensor) -> Tensor:
    """P^T P (d, d) float64 of `piece` (n, d); only its lower triangle is meant to be read.

    Up to a width of WHOLE it is one product. Above, the triangle is made in blocks of rows, for 56% of the work at a
    width of 2048; its bits may differ from those of one product.
    """
    p = piece.to("cpu", torch.float64)
    d = p.shape[1]
    size, larger = divmod(d, count := 1 if d <= WHOLE else -(-d // BLOCK))
    edges = [i * size + min(i, larger) for i in range(count + 1)]
    return lower_gram(p, edges, torch.zeros(d, d, dtype=torch.float64))


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A 128-bit hash (xxh3) of names, shapes and exact values; the dtype does not count where the values are the same.

    (Of float64 it does: its values are hashed as they are.) What is neither float32 nor float64 is hashed as float32.
    """
    total, buffer = xxhash.xxh3_128(), torch.empty(CHUNK)
    with one_thread():
        for name, weight in sorted(weights, key=lambda pair: pair[0]):
            total.update(f"{name} {tuple(weight.shape)} ".encode())
            flat = weight.detach().cpu().contiguous().view(-1)
            if weight.dtype in (torch.float32, torch.float64):
                total.update(flat.numpy())  # type: ignore[arg-type]
                continue
            for piece in flat.split(CHUNK):
                total.update(buffer[: len(piece)].copy_(piece).numpy())  # type: ignore[arg-type]
    return f"xxh3-{total.hexdigest()}"
