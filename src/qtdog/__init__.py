"""Quantization-aware training for domain generalization: train, keep and ship one quantized model.

The names below are loaded at their first use, so that `import qtdog` (and `qtdog --help`) stays fast.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtdog.conversion.attach import attach as attach
    from qtdog.conversion.attach import attached as attached
    from qtdog.conversion.load import load_into as load_into
    from qtdog.conversion.save import save as save
    from qtdog.core.quantized import QuantizedTensor as QuantizedTensor
    from qtdog.core.quantized import QuantSpec as QuantSpec
    from qtdog.ensemble.model import load as load
    from qtdog.ensemble.model import load as load_any

_HOMES = {
    "attach": "qtdog.conversion.attach",
    "attached": "qtdog.conversion.attach",
    "load_into": "qtdog.conversion.load",
    "save": "qtdog.conversion.save",
    "QuantizedTensor": "qtdog.core.quantized",
    "QuantSpec": "qtdog.core.quantized",
    "load": "qtdog.ensemble.model",
}

_ALIASES = {"load_any": "load"}
"""Earlier names, which still work."""

__all__ = ["QuantSpec", "QuantizedTensor", "__version__", "attach", "attached", "load", "load_any", "load_into", "save"]

try:
    __version__ = metadata.version("qtdog")
except metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    current = _ALIASES.get(name, name)
    if current not in _HOMES:
        raise AttributeError(f"module 'qtdog' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[current]), current)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
