"""The optional libraries of this room, imported when they are first needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from qtdog.core.errors import extra

EXTRAS = {
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "executorch": "executorch",
}


def library(name: str) -> ModuleType:
    """Return an optional library.

    Args:
        name: of the module, or of one inside it (`onnxscript.optimizer`).

    Raises:
        ModelError: it is not installed; the text says how to install it.

    Example:
        >>> library("onnx").__name__
        'onnx'
    """
    root = name.partition(".")[0]
    with extra(EXTRAS[root], f"this needs the library {root}, which cannot be imported"):
        return importlib.import_module(name)
