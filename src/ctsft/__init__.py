"""ctsft: fine-tune a transformer language model in its own spectrum.

`import ctsft` makes the method CTSFT known to peft, before or after peft itself is imported; alone it costs nothing.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

import wrapt

from ctsft.errors import CTError

if TYPE_CHECKING:
    from ctsft.calibration import calibrate
    from ctsft.config import CTConfig
    from ctsft.export import export_adapter
    from ctsft.store import save_adapter
    from ctsft.tuner import resize
    from ctsft.universal import universal_basis

__all__ = ["CTConfig", "CTError", "calibrate", "export_adapter", "resize", "save_adapter", "universal_basis"]
__version__ = "0.1.0"

HOMES = {
    "CTConfig": "config",
    "calibrate": "calibration",
    "export_adapter": "export",
    "resize": "tuner",
    "save_adapter": "store",
    "universal_basis": "universal",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'ctsft' has no attribute {name!r}")
    importlib.import_module("ctsft.tuner")
    return getattr(importlib.import_module(f"ctsft.{HOMES[name]}"), name)


def register(loaded: object) -> None:
    """Make CTSFT known to peft; where a file of ctsft itself imports peft first, as soon as that file is complete."""
    ours = [m for n, m in sys.modules.items() if n.startswith("ctsft.") and m is not loaded]
    if not any(getattr(m.__spec__, "_initializing", False) for m in ours):
        importlib.import_module("ctsft.tuner")
        importlib.import_module("ctsft.photonic")


for name in ("peft", "ctsft.config", "ctsft.layer", "ctsft.store", "ctsft.export"):
    wrapt.register_post_import_hook(register, name)
