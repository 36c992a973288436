"""What an exported file says of itself, and the optional libraries of this room."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qtdog.core.errors import FormatError, extra
from qtdog.training.load_model import Preprocessing

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
    known = sys.modules.get(name)
    if known is not None:
        return known
    root = name.partition(".")[0]
    with extra(EXTRAS[root], f"this needs the library {root}, which cannot be imported"):
        return importlib.import_module(name)


KEY = "qtdog"
"""Under this name the description lies in the metadata of an exported file, as JSON."""


class ExportInfo(BaseModel):
    """The description inside an exported file.

    The graph takes uint8 images (n, H, W, C), decoded and resized to `preprocessing.image_size` (bilinear, antialiased,
    nothing cropped), and does the rest itself.

    Attributes:
        format: a name of `export.formats.FORMATS`, or "packed" for a file of `qtdog train`.
        backbone: of every member.
        classes: names, in the order of the logits.
        preprocessing: how an image becomes the network's input.
        source_domains: trained on these.
        target_domain: held out in training, or None.
        n_members: networks inside.
        temperature: the probabilities are softmax(logits / temperature).
        cascade_threshold: confidence at which a cascade asks no further member; None where all are asked.
        accept_threshold: smallest probability of an answer that is accepted, or None.
        outputs: names of the graph's outputs.
        calibration: for integer activations: `domains`, `n_images`, `method`, `seed`.
        integer_products: convolutions and matrix products that compute in integers, and all that have weights; None in
            float formats.
        parity: how the file compared with the packed model (`export.parity.Parity`), None before that was measured.
        notes: what was changed on the way, in words.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: str
    backbone: str
    classes: tuple[str, ...] = Field(min_length=1, max_length=100_000)
    preprocessing: Preprocessing
    source_domains: tuple[str, ...]
    target_domain: str | None
    n_members: int = Field(ge=1, le=100)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    cascade_threshold: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    accept_threshold: float | None = Field(default=None, ge=0, le=1)
    outputs: tuple[str, ...]
    calibration: dict[str, Any] | None = None
    integer_products: tuple[int, int] | None = None
    parity: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def parse_info(path: object, text: str | None) -> ExportInfo:
    """Return the description in the metadata of an exported file.

    Args:
        path: the file, for errors.
        text: what lies under `KEY`; None if there is nothing.

    Raises:
        FormatError: nothing is there, or it is no such description.
    """
    if text is None:
        raise FormatError(f"{path} does not say what it is (no '{KEY}' in its metadata): make it with 'qtdog export'")
    try:
        return ExportInfo.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{path} does not describe an exported model: {where}: {first['msg']}") from error
