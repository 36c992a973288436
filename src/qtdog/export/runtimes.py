"""Open a model file, packed or exported, in a runtime: one way to ask them all."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qtdog.core.errors import ConfigError, FormatError, ModelError, QtdogError, unknown
from qtdog.export.c_header import open_header
from qtdog.export.formats import EXTRA_FILE, open_openvino
from qtdog.export.packed_source import KEY, ExportInfo, PackedSource, library, parse_info, read_packed_source
from qtdog.models.network import to_device_


def open_executorch(path: Path, threads: int) -> tuple[ExportInfo, Callable[[Any], list[Any]], Any]:
    """Return description, function and program of a .pte file; images are taken one by one.

    Args:
        path: the file.
        threads: ignored: the Python runtime takes what it finds.

    Raises:
        FormatError: damaged, or not made by qtdog.
        ModelError: executorch is not installed.
    """
    runtime = library("executorch.runtime").Runtime.get()
    try:
        program = runtime.load_program(path)
        info = program.load_method(KEY).execute([])[0] if KEY in program.method_names else None
        method = program.load_method("forward")
    except RuntimeError as error:
        raise FormatError(f"{path} cannot be opened by ExecuTorch: {error}") from error

    def run(images: Any) -> list[Any]:
        rows = [
            [value.numpy().copy() for value in method.execute([image])]
            for image in torch.from_numpy(np.ascontiguousarray(images)).split(1)
        ]
        return [np.concatenate(column) for column in zip(*rows, strict=True)]

    return parse_info(path, info), run, method


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
    return _explaining(Path("the graph"), "onnxruntime", lambda images: session.run(list(names), {source: images}))


def _explaining(path: Path, runtime: str, run: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """Return a function that says in a ModelError what a runtime cannot run: the first line, which has the operator."""

    def explained(images: Any) -> list[Any]:
        try:
            return run(images)
        except QtdogError:
            raise
        except Exception as error:  # each runtime has errors of its own
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            named = [line for line in lines if "node" in line.lower() or "operator" in line.lower()]
            text = f"{path} cannot run in {runtime} on {len(images)} images of {images.shape[1]} × {images.shape[2]}"
            raise ModelError(f"{text}: {(named or lines)[0][:400]}") from error

    return explained


Opened = tuple[ExportInfo, Callable[[Any], list[Any]], Any]


def open_packed(path: Path, threads: int) -> Opened:
    """Return description, function and module of a packed file: plain float32 layers, run one by one.

    Raises:
        FormatError: no sound packed file.
        ModelError: its backbone is not known here, or does not fit.
    """
    return open_module(read_packed_source(path), threads)


def open_module(source: PackedSource, threads: int) -> Opened:
    """Return description, function and module of a packed file's content.

    Raises:
        ModelError: its backbone is not known here, or does not fit.
    """
    module = source.module()
    for network in module.members:
        to_device_(network, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    return _opened(source.info("packed"), module, threads)


def open_program(path: Path, threads: int) -> Opened:
    """Return description, function and module of a .pt2 file.

    A .pt2 is a zip of tensors and a description of the graph, parts of which torch may read with pickle: open none that
    you do not trust. A file that does not say that `qtdog export` made it is refused, but anybody can say so.

    Raises:
        FormatError: damaged, or not made by qtdog.
    """
    extra = {EXTRA_FILE: ""}
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not any(name.endswith(EXTRA_FILE) for name in names):
            raise FormatError(f"{path} does not say what it is (no {EXTRA_FILE} inside): make it with 'qtdog export'")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecations inside torch
            program = torch.export.load(path, extra_files=extra)
    except (zipfile.BadZipFile, RuntimeError, ValueError, KeyError, OSError) as error:
        raise FormatError(f"{path} cannot be opened by torch.export: {error}") from error
    return _opened(parse_info(path, extra[EXTRA_FILE]), program.module(), threads)


def _opened(info: ExportInfo, module: Any, threads: int) -> Opened:
    torch.set_num_threads(threads)

    @torch.inference_mode()
    def run(images: Any) -> list[Any]:
        return [output.numpy() for output in module(torch.from_numpy(images))]

    return info, run, module


Pixels = npt.NDArray[np.uint8]
Outputs = dict[str, npt.NDArray[np.float32]]
Opener = Callable[[Path, int], tuple[ExportInfo, Callable[[Pixels], list[Any]], Any]]

SUFFIXES = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".pt2": ("torch",),
    ".pte": ("executorch",),
    ".h": ("torch",),
    ".safetensors": ("torch",),
}
"""The runtimes that can open a kind of file, the usual one first."""

RUNTIMES: Mapping[str, Opener] = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "torch": open_program,
    "executorch": open_executorch,
}


@dataclass(frozen=True)
class OpenModel:
    """A model file, ready to answer.

    Attributes:
        path: the file.
        runtime: "onnxruntime", "openvino", "torch" or "executorch".
        info: what the file says of itself.
        native: the runtime's own object: an `InferenceSession`, a `CompiledModel`, or a module.
        run: uint8 images (n, H, W, C) to the outputs in the order of `info.outputs`.
    """

    path: Path
    runtime: str
    info: ExportInfo
    native: Any = field(repr=False)
    run: Callable[[Pixels], list[Any]] = field(repr=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        preprocessing = self.info.preprocessing
        return preprocessing.image_size, preprocessing.image_size, preprocessing.channels

    def __call__(self, images: Pixels) -> Outputs:
        """Return the outputs by name for uint8 images (n, H, W, C).

        Raises:
            ConfigError: images of another shape or type.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.image_shape:
            expected = " × ".join(map(str, self.image_shape))
            raise ConfigError(f"{self.path} takes uint8 images n × {expected}, not {images.dtype} {images.shape}")
        return dict(zip(self.info.outputs, self.run(images), strict=True))


def runtimes_for(path: Path) -> tuple[str, ...]:
    """Return the runtimes that can open a file, the usual one first.

    Raises:
        FormatError: no kind of file that can be opened.

    Example:
        >>> runtimes_for(Path("model.onnx"))
        ('onnxruntime', 'openvino')
    """
    if path.suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise FormatError(f"{path} ends in '{path.suffix}': a model file ends in one of {known}")
    return SUFFIXES[path.suffix]


def open_packed_source(source: PackedSource, threads: int) -> OpenModel:
    """Return the content of a packed file opened in eager PyTorch.

    Args:
        source: the content.
        threads: that it may use, a setting of the whole process.

    Raises:
        ModelError: the backbone is not known here, or does not fit.
    """
    info, run, native = open_module(source, threads)
    return OpenModel(source.path, "torch", info, native, _explaining(source.path, "torch", run))


def open_runtime(path: str | Path, *, runtime: str | None = None, threads: int = 1) -> OpenModel:
    """Return a model file opened in a runtime.

    An exported file is a program: open none that you do not trust.

    Args:
        path: .onnx, .xml (OpenVINO, its .bin beside it), .pt2 (`torch.export`), .pte (ExecuTorch), or a packed
            .safetensors or a C header, from which eager PyTorch layers are made.
        runtime: "onnxruntime", "openvino", "torch" or "executorch"; None for the usual one of the file.
        threads: that it may use. For "torch" it is a setting of the whole process.

    Raises:
        ConfigError: the runtime is unknown, or cannot open such files.
        FormatError: the file is missing, damaged, or was not made by qtdog.
        ModelError: the runtime is not installed, or cannot run the model.
    """
    path = Path(path)
    able = runtimes_for(path)
    name = able[0] if runtime is None else runtime
    if name not in RUNTIMES:
        raise ConfigError(unknown("runtime", name, RUNTIMES))
    if name not in able:
        raise ConfigError(f"{name} cannot open {path}; {path.suffix} files run in {' or '.join(able)}")
    if not path.is_file():
        raise FormatError(f"{path} does not exist; give the path of a model file")
    opener = {".safetensors": open_packed, ".h": open_header}.get(path.suffix, RUNTIMES[name])
    info, run, native = opener(path, threads)
    return OpenModel(path, name, info, native, _explaining(path, name, run))
