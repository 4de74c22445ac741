"""Records: what a run leaves on disk, written so that a kill leaves the old file or the new one."""

import contextlib
import json
import os
import platform
import re
import tomllib
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs

from ctsft.errors import CTError, needs

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # of a model or data set, org/name
PACKAGES = ("ctsft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")


def home() -> Path:
    """The cache folder: `$CTSFT_CACHE`, else the system's own (on Linux `~/.cache/ctsft`). It need not exist."""
    return Path(os.environ.get("CTSFT_CACHE") or platformdirs.user_cache_path("ctsft", appauthor=False)).expanduser()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` to write to; it takes the place of `path` if the block ends well, else it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON (see `write_text`); NaN and infinity, which JSON does not know, raise ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; CTError where it is none, NaN and infinity included, or nested too deeply."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise CTError(f"{path} cannot be read as JSON ({error}); it is damaged, make it anew.") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of the TOML file `path`; CTError where it is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CTError(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise CTError(f"{path} is no TOML: {error}.") from None


def versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers."""
    return {name: version(name) for name in PACKAGES}


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927), as fractions from 0 to 1."""
    with needs("tune"):
        from scipy.stats import binomtest

    if total == 0:
        return 0.0, 1.0
    interval = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
