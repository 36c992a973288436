"""ONNX files in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtdog.core.errors import FormatError, ModelError
from qtdog.export.info import KEY, ExportInfo, parse_info
from qtdog.export.libraries import library

QUIET = 3  # onnxruntime's level "error"


def open_onnxruntime(path: Path, threads: int) -> tuple[ExportInfo, Callable[[Any], list[Any]], Any]:
    """Return description, function and session of an .onnx file.

    Args:
        path: the file.
        threads: that one call may use.

    Raises:
        FormatError: damaged, or not made by qtdog.
        ModelError: onnxruntime is not installed, or has no implementation of an operator.
    """
    ort = library("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = QUIET
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes share no base but this
        raise _explained(path, error) from error
    info = parse_info(path, session.get_modelmeta().custom_metadata_map.get(KEY))
    name = session.get_inputs()[0].name
    return info, lambda images: session.run(None, {name: images}), session


def _explained(path: Path, error: Exception) -> FormatError | ModelError:
    said = str(error).strip().splitlines()[0]
    if "NOT_IMPLEMENTED" in said:
        return ModelError(f"onnxruntime lacks an operator of {path}: {said}")
    return FormatError(f"{path} cannot be opened by onnxruntime: {said}")


def open_points(graph: Any, names: Sequence[str]) -> Callable[[Any], list[Any]]:
    """Return a function from images to the values of some activations of a graph.

    Args:
        graph: an `onnx_ir.Model` from images.
        names: of the activations.

    Raises:
        ModelError: onnxruntime is not installed, or has no implementation of an operator.
    """
    ort, onnx, ir = library("onnxruntime"), library("onnx"), library("onnx_ir")
    proto = ir.to_proto(graph)
    known = {output.name for output in proto.graph.output}
    float32 = onnx.TensorProto.FLOAT
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, float32, None) for name in names if name not in known
    )
    options = ort.SessionOptions()
    options.log_severity_level = QUIET
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes share no base but this
        raise _explained(Path("the graph"), error) from error
    source = session.get_inputs()[0].name
    return lambda images: session.run(list(names), {source: images})
