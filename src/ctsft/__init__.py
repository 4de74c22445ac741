"""ctsft: fine-tune a transformer language model in its own spectrum.

`import ctsft` makes the method CTSFT known to peft, before or after peft itself is imported; alone it costs nothing.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

from ctsft.compat import being_imported
from ctsft.errors import CTError

if TYPE_CHECKING:
    from ctsft.adapter.calibrate import calibrate
    from ctsft.adapter.config import CTConfig
    from ctsft.adapter.export import export_adapter
    from ctsft.adapter.learn import learn_basis
    from ctsft.adapter.rate import learning_rate
    from ctsft.adapter.read import load_adapter
    from ctsft.adapter.resize import resize
    from ctsft.adapter.store import save_adapter
    from ctsft.adapter.swap import hotswap
    from ctsft.plan.compare import compare
    from ctsft.plan.plan import make_plan
    from ctsft.spectral.universal import universal_basis

__all__ = [
    "CTConfig",
    "CTError",
    "calibrate",
    "compare",
    "export_adapter",
    "hotswap",
    "learn_basis",
    "learning_rate",
    "load_adapter",
    "make_plan",
    "resize",
    "save_adapter",
    "universal_basis",
]
__version__ = "0.1.0"

HOMES = {
    "CTConfig": "adapter.config",
    "calibrate": "adapter.calibrate",
    "compare": "plan.compare",
    "export_adapter": "adapter.export",
    "hotswap": "adapter.swap",
    "learn_basis": "adapter.learn",
    "learning_rate": "adapter.rate",
    "load_adapter": "adapter.read",
    "make_plan": "plan.plan",
    "resize": "adapter.resize",
    "save_adapter": "adapter.store",
    "universal_basis": "spectral.universal",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'ctsft' has no attribute {name!r}")
    importlib.import_module("ctsft.adapter.model")
    return getattr(importlib.import_module(f"ctsft.{HOMES[name]}"), name)


def register(loaded: object) -> None:
    """Make CTSFT known to peft; where a file of room adapter imports peft first, as soon as that file is complete."""
    ours = [m for n, m in sys.modules.items() if n.startswith("ctsft.adapter.") and m is not loaded]
    if not any(being_imported(m) for m in ours):
        importlib.import_module("ctsft.adapter.model")
        importlib.import_module("ctsft.models.photonic")


ADAPTER_FILES = [f"ctsft.adapter.{path.stem}" for path in (Path(__file__).parent / "adapter").glob("[!_]*.py")]
for name in ("peft", *ADAPTER_FILES):
    wrapt.register_post_import_hook(register, name)
