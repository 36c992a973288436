"""The formats that a packed model can be exported to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import ConfigError
from qtdog.core.registry import Registry
from qtdog.export.c_header import save_header
from qtdog.export.info import ExportInfo
from qtdog.export.onnx_graph import save_onnx
from qtdog.export.openvino import save_openvino
from qtdog.export.packed_source import PackedSource
from qtdog.export.parity import FLOAT, INTEGER, ParityLimits
from qtdog.export.torch_export import save_executorch, save_program

Save = Callable[[PackedSource, Any, Path, ExportInfo], None]


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        title: for people.
        about: one line for people.
        suffix: of the file.
        save: writes a source (or its ONNX graph) with its description to a path.
        graph: whether it is made from the ONNX graph; else from the module.
        integer: whether activations are integers too, so that it needs calibration.
    """

    title: str
    about: str
    suffix: str
    save: Save
    graph: bool = True
    integer: bool = False

    @property
    def limits(self) -> ParityLimits:
        """How far it may be from the packed model."""
        return INTEGER if self.integer else FLOAT


FORMATS: Registry[Format] = Registry("export format")
FORMATS.add("onnx", Format("ONNX", "Integer weights, made float when the file is loaded.", ".onnx", save_onnx))
FORMATS.add("onnx-int8", Format("ONNX INT8", "Integer weights and activations.", ".onnx", save_onnx, integer=True))
FORMATS.add("openvino", Format("OpenVINO IR", "Integer weights, made float when compiled.", ".xml", save_openvino))
FORMATS.add(
    "openvino-int8",
    Format("OpenVINO IR INT8", "Integer weights and activations.", ".xml", save_openvino, integer=True),
)
FORMATS.add(
    "torch", Format("torch.export", "A program for PyTorch, integer weights.", ".pt2", save_program, graph=False)
)
FORMATS.add(
    "executorch", Format("ExecuTorch", "A program for phones; float weights.", ".pte", save_executorch, graph=False)
)
FORMATS.add(
    "c", Format("C header", "Codes, step sizes and shapes for a program of one's own.", ".h", save_header, graph=False)
)


def format_for(name: str | None, out: Path) -> str:
    """Return the name of the format to write: the one given, else the float one that the file's suffix says.

    Raises:
        ConfigError: unknown, or the suffix is another format's.

    Example:
        >>> format_for(None, Path("model.onnx")), format_for("openvino-int8", Path("model.xml"))
        ('onnx', 'openvino-int8')
    """
    by_suffix = {FORMATS[known].suffix: known for known in sorted(FORMATS, reverse=True)}
    if name is None:
        if out.suffix not in by_suffix:
            raise ConfigError(f"{out}: which format? Give --format, or a file that ends in {', '.join(by_suffix)}")
        return by_suffix[out.suffix]
    suffix = FORMATS[name].suffix
    if out.suffix != suffix:
        raise ConfigError(f"{out}: a file of the format '{name}' ends in {suffix}")
    return name
