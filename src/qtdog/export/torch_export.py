"""Programs of `torch.export`, and from them ExecuTorch's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qtdog.core.errors import ModelError
from qtdog.core.quantized import QuantizedTensor
from qtdog.export.inference_module import InferenceModule
from qtdog.export.info import KEY, ExportInfo, library
from qtdog.export.onnx_graph import quiet, unsupported
from qtdog.export.packed_source import PackedSource
from qtdog.export.runtimes import EXTRA_FILE


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


def save_executorch(source: PackedSource, _: Any, path: Path, info: ExportInfo) -> None:
    """Write a packed model as a .pte program for one image, its description as a method called `qtdog`.

    Raises:
        ModelError: executorch is not installed, or cannot take the program; the text says why.
    """
    exir = library("executorch.exir")
    xnnpack = library("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    program = _program(source.module(), source, free_batch=False)
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
