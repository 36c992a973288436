"""The formats of exports; OpenVINO IR and PyTorch's programs, which are written as they come from their libraries."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qtdog.core.errors import ConfigError, FormatError, ModelError, RunError
from qtdog.core.quantized import QuantizedTensor
from qtdog.core.registry import Registry
from qtdog.export.c_header import save_header
from qtdog.export.inference_module import InferenceModule
from qtdog.export.onnx_graph import quiet, save_onnx, to_bytes, unsupported
from qtdog.export.packed_source import KEY, ExportInfo, PackedSource, library, parse_info
from qtdog.export.parity import FLOAT, INTEGER, ParityLimits

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


def save_program(source: PackedSource, _: Any, path: Path, info: ExportInfo) -> None:
    """Write a packed model as a .pt2 program with its description as an extra file.

    The weights are the integer codes, made float whenever the program runs.

    Raises:
        ModelError: the backbone does not fit, or `torch.export` cannot follow it; the text names the operator.
    """
    module = source.module()
    for name, value in source.codes().items():
        use_codes_(module, name, value)
    program = _program(module, source, free_batch=True)
    stream = io.BytesIO()  # where the disk is full, its writer ends the process
    with quiet():
        torch.export.save(program, stream, extra_files={EXTRA_FILE: info.model_dump_json()})
    path.write_bytes(stream.getbuffer())


def save_executorch(source: PackedSource, networks: Any, path: Path, info: ExportInfo) -> None:
    """Write a packed model as a .pte program for one image, its description as a method called `qtdog`.

    Args:
        source: the packed model.
        networks: its members in integers (`export.executorch_int8`); None for those in float.
        path: the file.
        info: the description.

    Raises:
        ModelError: executorch is not installed, or cannot take the program; the text says why.
    """
    exir = library("executorch.exir")
    xnnpack = library("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    module = source.module()
    if networks is not None:
        module.members = nn.ModuleList(networks)
    program = _program(module, source, free_batch=False)
    with quiet():
        try:
            lowered = exir.to_edge_transform_and_lower(
                program,
                partitioner=[xnnpack.XnnpackPartitioner()],
                constant_methods={KEY: info.model_dump_json()},
            )
            content = lowered.to_executorch().buffer
        except Exception as error:  # executorch's own classes share no base but this
            raise ModelError(f"{source.path} cannot be exported to ExecuTorch: {unsupported(error)}") from error
    path.write_bytes(content)


def _program(module: InferenceModule, source: PackedSource, *, free_batch: bool) -> Any:
    preprocessing = source.infos[0].preprocessing
    n = 2 if free_batch else 1
    example = torch.zeros(
        n, preprocessing.image_size, preprocessing.image_size, preprocessing.channels, dtype=torch.uint8
    )
    shapes = ({0: torch.export.Dim.AUTO},) if free_batch else None
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError) as error:  # the exporter's own errors are RuntimeErrors
        raise ModelError(f"{source.path} cannot be exported by torch.export: {unsupported(error)}") from error


class _FromCodes(nn.Module):
    """A weight as point(code) · scale."""

    def __init__(self, value: QuantizedTensor) -> None:
        super().__init__()
        spec = value.spec
        self.register_buffer("scale", spec.spread(value.scale, value.codes.shape))
        plain = spec.levels in ("uniform", "symmetric")
        self.register_buffer("points", None if plain else spec.points())
        self.qmin = spec.qmin

    def forward(self, codes: Tensor) -> Tensor:
        unit = codes.to(torch.float32) if self.points is None else self.get_buffer("points")[codes.long() - self.qmin]
        return unit * self.get_buffer("scale")


def use_codes_(module: nn.Module, name: str, value: QuantizedTensor) -> None:
    """Let a module keep a weight as its codes, in place.

    Args:
        module: the whole.
        name: of the weight in its state dict.
        value: its codes.

    Example:
        >>> from qtdog.core.quantized import QuantSpec
        >>> layer, codes = nn.Linear(2, 1), torch.tensor([[1, -2]], dtype=torch.int8)
        >>> use_codes_(layer, "weight", QuantizedTensor(codes, torch.tensor([0.5]), QuantSpec(3)))
        >>> layer.weight
        tensor([[ 0.5000, -1.0000]])
    """
    owner, _, attribute = name.rpartition(".")
    layer = module.get_submodule(owner)
    setattr(layer, attribute, nn.Parameter(value.codes.contiguous(), requires_grad=False))
    parametrize.register_parametrization(layer, attribute, _FromCodes(value), unsafe=True)


EXTRA_FILE = "qtdog.json"


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
    "executorch-int8",
    Format("ExecuTorch INT8", "Integer weights and activations.", ".pte", save_executorch, graph=False, integer=True),
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
    by_suffix = {FORMATS[known].suffix: known for known in sorted(FORMATS, reverse=True) if not FORMATS[known].integer}
    if name is None:
        if out.suffix not in by_suffix:
            raise ConfigError(f"{out}: which format? Give --format, or a file that ends in {', '.join(by_suffix)}")
        return by_suffix[out.suffix]
    suffix = FORMATS[name].suffix
    if out.suffix != suffix:
        raise ConfigError(f"{out}: a file of the format '{name}' ends in {suffix}")
    return name
