"""OpenVINO: write IR (an .xml and a .bin beside it), and run ONNX files and IR."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qtdog.core.errors import FormatError, ModelError, RunError
from qtdog.export.info import KEY, ExportInfo, library, parse_info
from qtdog.export.onnx_graph import to_bytes
from qtdog.export.packed_source import PackedSource

# where the processor has bfloat16, OpenVINO computes in it unless the precision is set, and logits move by 0.2
PRECISION = "f32"


def open_openvino(path: Path, threads: int) -> tuple[ExportInfo, Callable[[Any], list[Any]], Any]:
    """Return description, function and compiled model of an .xml or .onnx file.

    Args:
        path: the file; an .xml has its .bin beside it.
        threads: that one call may use.

    Raises:
        FormatError: damaged, incomplete, or not made by qtdog.
        ModelError: OpenVINO is not installed.
    """
    openvino = library("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISION,
    }
    core = openvino.Core()
    try:
        model = core.read_model(path)
        info = parse_info(path, description_in(model, path))
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        raise FormatError(f"{path} cannot be opened by OpenVINO: {said}. An .xml needs its .bin beside it") from error

    def run(images: Any) -> list[Any]:
        found = compiled([images])
        return [found[index] for index in range(len(info.outputs))]

    return info, run, compiled


def description_in(model: Any, path: Path) -> str | None:
    """Return the description in a model that OpenVINO has read, or None."""
    if path.suffix == ".onnx":
        onnx = library("onnx")
        entries = onnx.load(path, load_external_data=False).metadata_props
        return next((entry.value for entry in entries if entry.key == KEY), None)
    return model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None


def save_openvino(source: PackedSource, graph: Any, path: Path, info: ExportInfo) -> None:
    """Write an ONNX graph as OpenVINO IR with its description in the runtime information.

    Raises:
        ModelError: the openvino extra is not installed, or OpenVINO lacks an operator; the text names it.
    """
    openvino = library("openvino")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.onnx"
        content = to_bytes(source, graph, info)
        file.write_bytes(content)
        try:
            with no_usage_reports():
                model = openvino.convert_model(file)
        except Exception as error:  # OpenVINO's own classes share no base but this
            said = " ".join(str(error).split())[:400]
            raise ModelError(f"OpenVINO cannot convert {source.path}: {said}") from error
        model.set_rt_info(info.model_dump_json(), KEY)
        # a full disk is an error of the operating system's; OpenVINO has one error for everything
        n_described = DESCRIBED_BYTES * len(model.get_ordered_ops()) + len(info.model_dump_json())
        require_space(path.with_suffix(".bin"), len(content))
        require_space(path, n_described)
        try:
            # float16 would move the logits, and the weights are integers already
            openvino.save_model(model, path, compress_to_fp16=False)
        except Exception as error:
            said = " ".join(str(error).split())[:400]
            raise RunError(f"OpenVINO could not write {path.name}: {said}. Is the disk full?") from error


@contextlib.contextmanager
def no_usage_reports() -> Iterator[None]:
    """Keep OpenVINO's converter from reporting its use to its makers, which it does not in continuous integration.

    Without this it sends a request and writes `~/intel`, unasked.

    Example:
        >>> with no_usage_reports():
        ...     os.environ["CI"]
        'true'
    """
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


DESCRIBED_BYTES = 1500  # of an operation in the .xml


def require_space(path: Path, n_bytes: int) -> None:
    """Raise OSError (no space, quota, limit of a file's size) unless a new file can have so many bytes."""
    with path.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, n_bytes))
