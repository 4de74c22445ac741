"""The universal basis (paper 78) of a model on disk, in one pass over its files: the model is never held."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ctsft.errors import CTError
from ctsft.files import read_json
from ctsft.models.load import load_skeleton
from ctsft.models.reading import one_sentence
from ctsft.progress import watched
from ctsft.spectral.decompose import one_thread, principal_directions
from ctsft.spectral.weights import ROWS, check_finite, gram_of, matrix, takes_part_transposed, universal_members, width

FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class UniversalBasis:
    """The directions of all matrices' rows together, most energy first.

    directions: (d_model, d_model) float64, as rows. values: (d_model,) float64, the rows' squared norm along each.
    members: the number of matrices whose rows they are.
    """

    directions: Tensor
    values: Tensor
    members: int

    def explained(self, k: int) -> float:
        """The share of the squared norm of all rows that lies in the first `k` directions."""
        return float(self.values[:k].sum() / self.values.sum())


def universal_basis(model: str | Path, bar: str | None = None) -> UniversalBasis:
    """The universal basis of `model`, a name, folder or .gguf file (see `models.resolve`), in one pass over its files.

    Exact: the same matrices, orientation and float64 sums as for the loaded model, of the numbers as they are stored.
    Beside the libraries, memory holds a few pieces of 8192 rows and a few d_model x d_model matrices. `bar` is the text
    of a progress bar, None for no bar. Raises CTError for whatever is no model folder with all its weights in
    safetensors, and for weights that are quantised, NaN or infinite.
    """
    skeleton, folder = load_skeleton(str(model))
    d_model = width(skeleton)
    members = universal_members(skeleton, d_model)
    checkpoint = Checkpoint(folder, skeleton)
    checkpoint.check(members)
    shown = watched(members.items(), bar)
    gram = gram_of((piece for name, m in shown for piece in checkpoint.rows(name, m, d_model)), d_model)
    with one_thread():
        values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return UniversalBasis(principal_directions(gram, d_model), values, len(members))


class Checkpoint:
    """The safetensors files of a Hugging Face folder, read by the names that modules have in `skeleton`.

    Keys may have or lack the prefix of the base model; of tied weights any name may be the stored one.
    """

    def __init__(self, folder: Path, skeleton: nn.Module) -> None:
        self.folder = folder
        self.prefix = getattr(skeleton, "base_model_prefix", "") + "."
        self.uses: dict[int, list[str]] = {}  # of a weight: the names of the modules that have it
        for name, module in skeleton.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor):
                self.uses.setdefault(id(module.weight), []).append(name)
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        with one_sentence(folder):
            if single.is_file():
                with safe_open(single, "pt") as file:
                    self.files = dict.fromkeys(file.keys(), single)
            elif index.is_file():
                self.files = {key: folder / shard for key, shard in read_json(index)["weight_map"].items()}
            else:
                raise CTError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")

    def stored(self, module: Any) -> list[str]:
        """The keys under which the weight of `module` is stored: one, or of a tied weight perhaps several."""
        keys = [f"{name}.weight" for name in self.uses[id(module.weight)]]
        spellings = [s for k in keys for s in (k, k.removeprefix(self.prefix), self.prefix + k)]
        return [s for s in dict.fromkeys(spellings) if s in self.files]

    def check(self, members: dict[str, Any]) -> None:
        """CTError unless every one of `members` is stored, whole, in a floating dtype, and tied weights are equal."""
        for name, module in members.items():
            keys = self.stored(module)
            if not keys:
                raise CTError(f"{self.folder} holds no weights for {name}; its files are incomplete, fetch it again.")
            with one_sentence(self.folder), safe_open(self.files[keys[0]], "pt") as file:
                found = file.get_slice(keys[0])
                shape, dtype = tuple(found.get_shape()), found.get_dtype()
            if dtype not in FLOATS:
                raise CTError(f"{name} is quantised ({dtype}); take the model in bfloat16 or float32.")
            if shape != (wanted := tuple(module.weight.shape)):
                raise CTError(f"{name} is {shape} in {self.folder} and {wanted} by its config.json; fetch it again.")
            for other in keys[1:]:
                pairs = zip(self.pieces(keys[0], shape), self.pieces(other, shape), strict=True)
                if not all(torch.equal(a, b) for a, b in pairs):
                    raise CTError(
                        f"{self.folder} ties {keys[0]} to {other} by its config.json, yet their stored numbers differ; "
                        'set "tie_word_embeddings": false there.'
                    )

    def rows(self, name: str, module: Any, d_model: int) -> Iterator[Tensor]:
        """What `weights.rows` gives for the weight of `module`, split into pieces (n, d_model), n <= ROWS."""
        turned = takes_part_transposed(name, matrix(module).shape, d_model) != isinstance(module, Conv1D)
        for piece in self.pieces(self.stored(module)[0], module.weight.shape, int(turned)):
            check_finite(name, piece)
            yield piece.T if turned else piece

    def pieces(self, key: str, shape: Sequence[int], axis: int = 0) -> Iterator[Tensor]:
        """The tensor `key` of `shape` in pieces along `axis`.

        A piece is a view of the file, mapped anew for each, so that what was read of it leaves memory with the piece.
        """
        for start in range(0, shape[axis], ROWS):
            where = (slice(None),) * axis + (slice(start, start + ROWS),)
            with one_sentence(self.folder), safe_open(self.files[key], "pt") as file:
                piece = file.get_slice(key)[where]
            yield piece
