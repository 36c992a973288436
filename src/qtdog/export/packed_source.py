"""A packed file, single or an ensemble, as what is exported, and what the exported file says of itself."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qtdog.core.errors import FormatError, ModelError, extra
from qtdog.core.quantized import QuantizedTensor
from qtdog.export.inference_module import ACCEPT, OUTPUTS, InferenceModule
from qtdog.packing.ensemble_file import read_packed
from qtdog.packing.packed_file import PackedModel
from qtdog.quantizers.activations import ActivationGrid
from qtdog.training.load_model import STRUCTURE, ModelInfo, Preprocessing, build_networks, read_info

EXTRAS = {
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "executorch": "executorch",
    "torchao": "executorch",
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


@dataclass(frozen=True)
class PackedSource:
    """The frozen content of a packed file.

    Attributes:
        path: the file.
        members: codes, step sizes and the rest, one for each network.
        infos: what each member says of itself.
        temperature: of the probabilities.
        accept_threshold: smallest probability of an answer that is accepted, or None.
    """

    path: Path
    members: tuple[PackedModel, ...]
    infos: tuple[ModelInfo, ...]
    temperature: float = 1.0
    accept_threshold: float | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what comes out."""
        return OUTPUTS[len(self.members) > 1] + (() if self.accept_threshold is None else (ACCEPT,))

    def info(self, name: str) -> ExportInfo:
        """Return the description of an export to the format called `name`, nothing being measured yet."""
        first = self.infos[0]
        return ExportInfo(
            format=name,
            backbone=first.backbone,
            classes=first.classes,
            preprocessing=first.preprocessing,
            source_domains=first.source_domains,
            target_domain=first.target_domain,
            n_members=len(self.members),
            temperature=self.temperature,
            accept_threshold=self.accept_threshold,
            outputs=self.outputs,
        )

    def module(self, *, float_activations: bool = False) -> InferenceModule:
        """Return the model as a module from uint8 images to the outputs, weights dequantized, in evaluation mode.

        Args:
            float_activations: leave activations in float, although the model was trained with grids for them.

        Raises:
            ModelError: the backbone is not known here, or does not fit.
        """
        networks = build_networks(self.path, self.members, self.infos[0], float_activations=float_activations)
        return InferenceModule(
            networks,
            self.infos[0].preprocessing,
            self.temperature,
            self.accept_threshold,
        )

    def grids(self, index: int) -> dict[str, ActivationGrid]:
        """Return the grids that member `index` was trained with, of the inputs of layers by name."""
        notes = self.infos[index].activations
        return {name: ActivationGrid(note.bits, note.signed, note.scale) for name, note in notes.items()}

    def codes(self) -> dict[str, QuantizedTensor]:
        """Return the integer codes by the names that the weights have in `module()`."""
        return {
            f"members.{index}.{name}": value
            for index, member in enumerate(self.members)
            for name, value in member.quantized.items()
        }


def read_packed_source(path: Path) -> PackedSource:
    """Return the content of a packed file, one model or an ensemble.

    Args:
        path: the file.

    Raises:
        FormatError: missing, truncated, hostile, of another version, or members that do not go together.
        ModelError: it reads text.
    """
    whole = read_packed(path)
    if isinstance(whole, PackedModel):
        info = _image_info(path, whole)
        return PackedSource(path, (whole,), (info,), info.temperature, accept_threshold=info.accept_threshold)
    infos = tuple(_image_info(path, member) for member in whole.members)
    for name in STRUCTURE:
        if any(getattr(info, name) != getattr(infos[0], name) for info in infos):
            raise FormatError(f"{path}: the members of an ensemble have one {name}, found several")
    temperature = _number(path, "temperature", whole.about.get("temperature", 1.0))
    accept = whole.about.get("accept_threshold")
    accept = None if accept is None else _number(path, "accept_threshold", accept)
    return PackedSource(path, whole.members, infos, temperature, accept)


def _image_info(path: Path, packed: PackedModel) -> ModelInfo:
    info = read_info(path, packed.metadata)
    if info.preprocessing.max_tokens:
        raise ModelError(f"{path} reads text; only models of images can be exported or timed")
    return info


def _number(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise FormatError(f"{path}: {name} should be positive and finite, found {str(value)[:40]}")
    return float(value)
