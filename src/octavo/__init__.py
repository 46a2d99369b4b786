"""Octavo: vector quantization of large language models at 1.5 to 4 bits per weight.

After ``import octavo``, ``transformers.AutoModelForCausalLM.from_pretrained`` loads the checkpoints of Octavo and of
VPTQ. Everything below is imported at first use, so the import itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from octavo._core.on_import import on_import

if TYPE_CHECKING:
    from octavo import algorithms
    from octavo._core import errors
    from octavo.integrations.api import compare, evaluate
    from octavo.integrations.transformers import load
    from octavo.layout import Layout
    from octavo.pipeline import plan, quantize
    from octavo.pipeline.convert import convert
    from octavo.pipeline.tune import tune
    from octavo.weight import VQWeight

__version__ = "0.1.0"
__all__ = [
    "Layout",
    "VQWeight",
    "__version__",
    "algorithms",
    "compare",
    "convert",
    "errors",
    "evaluate",
    "load",
    "plan",
    "quantize",
    "tune",
]

_WHERE = {
    "Layout": "octavo.layout",
    "VQWeight": "octavo.weight",
    "compare": "octavo.integrations.api",
    "convert": "octavo.pipeline.convert",
    "evaluate": "octavo.integrations.api",
    "load": "octavo.integrations.transformers",
    "plan": "octavo.pipeline",
    "quantize": "octavo.pipeline",
    "tune": "octavo.pipeline.tune",
}
_MODULES = {"algorithms": "octavo.algorithms", "errors": "octavo._core.errors"}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(_WHERE[name]), name)
    elif name in _MODULES:
        value = import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# The quantizer is registered once transformers' model code is there, whichever of the two is imported first.
on_import("transformers.modeling_utils", lambda: import_module("octavo.integrations.transformers") and None)
