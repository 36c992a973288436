"""Writing an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtdog.core.errors import ModelError
from qtdog.export.info import KEY, ExportInfo
from qtdog.export.libraries import library
from qtdog.export.onnx_graph import quiet
from qtdog.export.subject import Subject

MAX_BYTES = 2**31 - 1


def save_onnx(subject: Subject, graph: Any, path: Path, info: ExportInfo) -> None:
    """Write a graph as one .onnx file with its description in the metadata.

    Raises:
        ModelError: it would be larger than 2 GiB, which the format cannot hold in one file.
    """
    path.write_bytes(to_bytes(subject, graph, info))


def to_bytes(subject: Subject, graph: Any, info: ExportInfo) -> bytes:
    """Return the content of the .onnx file.

    Raises:
        ModelError: as in `save_onnx`.
    """
    ir = library("onnx_ir")
    graph.metadata_props[KEY] = info.model_dump_json()
    graph.producer_name = "qtdog"
    with quiet():
        proto = ir.to_proto(graph)
    if proto.ByteSize() > MAX_BYTES:
        raise ModelError(f"{subject.path}: as ONNX it would take {proto.ByteSize()} bytes; one file holds {MAX_BYTES}")
    return proto.SerializeToString()
