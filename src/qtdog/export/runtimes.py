"""Opening a model file, packed or exported, in a runtime: one way to ask them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import ConfigError, FormatError, unknown
from qtdog.export.info import ExportInfo
from qtdog.export.runtime_executorch import open_executorch
from qtdog.export.runtime_onnx import open_onnxruntime
from qtdog.export.runtime_openvino import open_openvino
from qtdog.export.runtime_torch import open_module, open_packed, open_program
from qtdog.export.subject import Subject

Pixels = npt.NDArray[np.uint8]
Outputs = dict[str, npt.NDArray[np.float32]]
Opener = Callable[[Path, int], tuple[ExportInfo, Callable[[Pixels], list[Any]], Any]]

SUFFIXES = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".pt2": ("torch",),
    ".pte": ("executorch",),
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
        how = self.info.preprocessing
        return how.image_size, how.image_size, how.channels

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


def open_subject(subject: Subject, threads: int) -> OpenModel:
    """Return the content of a packed file opened in eager PyTorch.

    Args:
        subject: the content; with a threshold it answers as a cascade.
        threads: that it may use, a setting of the whole process.

    Raises:
        ModelError: the backbone is not known here, or does not fit.
    """
    info, run, native = open_module(subject, threads)
    return OpenModel(subject.path, "torch", info, native, run)


def open_runtime(path: str | Path, *, runtime: str | None = None, threads: int = 1) -> OpenModel:
    """Return a model file opened in a runtime.

    An exported file is a program: open none that you do not trust.

    Args:
        path: .onnx, .xml (OpenVINO, its .bin beside it), .pt2 (`torch.export`), .pte (ExecuTorch), or a packed
            .safetensors, which runs in eager PyTorch.
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
    opener = open_packed if path.suffix == ".safetensors" else RUNTIMES[name]
    info, run, native = opener(path, threads)
    return OpenModel(path, name, info, native, run)
