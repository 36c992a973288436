"""ExecuTorch programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtdog.core.errors import FormatError
from qtdog.export.info import KEY, ExportInfo, library, parse_info


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
