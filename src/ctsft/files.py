"""Records: what a run leaves on disk, written so that a kill leaves the old file or the new one."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ctsft.errors import CTError

PACKAGES = ("ctsft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")


def home() -> Path:
    """The cache folder: `$CTSFT_CACHE`, else `$XDG_CACHE_HOME/ctsft`, else `~/.cache/ctsft`. It need not exist."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctsft"
    return Path(os.environ.get("CTSFT_CACHE") or default).expanduser()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all: through a hidden file beside it and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON (see `write_text`); NaN and infinity, which JSON does not know, raise ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; CTError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CTError(f"{path} cannot be read as JSON ({error}); it is damaged, make it anew.") from None


def versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers."""
    return {name: version(name) for name in PACKAGES}


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927), as fractions from 0 to 1."""
    if total == 0:
        return 0.0, 1.0
    share, n = hits / total, z * z / total
    middle, half = share + n / 2, z * (share * (1 - share) / total + n / (4 * total)) ** 0.5
    return max(0.0, (middle - half) / (1 + n)), min(1.0, (middle + half) / (1 + n))


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
