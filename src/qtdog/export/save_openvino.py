"""Writing OpenVINO IR: an .xml and a .bin beside it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from qtdog.core.errors import ModelError
from qtdog.export.info import KEY, ExportInfo
from qtdog.export.libraries import library
from qtdog.export.save_onnx import to_bytes
from qtdog.export.subject import Subject


def save_openvino(subject: Subject, graph: Any, path: Path, info: ExportInfo) -> None:
    """Write an ONNX graph as OpenVINO IR with its description in the runtime information.

    Raises:
        ModelError: the openvino extra is not installed, or OpenVINO lacks an operator; the text names it.
    """
    openvino = library("openvino")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "graph.onnx"
        source.write_bytes(to_bytes(subject, graph, info))
        try:
            model = openvino.convert_model(source)
        except Exception as error:  # OpenVINO's own classes share no base but this
            said = " ".join(str(error).split())[:400]
            raise ModelError(f"OpenVINO cannot convert {subject.path}: {said}") from error
        model.set_rt_info(info.model_dump_json(), KEY)
        # float16 would move the logits, and the weights are integers already
        openvino.save_model(model, path, compress_to_fp16=False)
