"""Packed files in eager PyTorch, and `torch.export` programs."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qtdog.core.errors import FormatError
from qtdog.export.info import ExportInfo, parse_info
from qtdog.export.subject import Subject, read_subject
from qtdog.models.network import place_

EXTRA_FILE = "qtdog.json"

Opened = tuple[ExportInfo, Callable[[Any], list[Any]], Any]


def open_packed(path: Path, threads: int) -> Opened:
    """Return description, function and module of a packed file: plain float32 layers, run one by one.

    Raises:
        FormatError: no sound packed file.
        ModelError: its backbone is not known here, or does not fit.
    """
    return open_module(read_subject(path), threads)


def open_module(subject: Subject, threads: int) -> Opened:
    """Return description, function and module of a packed file's content.

    Raises:
        ModelError: its backbone is not known here, or does not fit.
    """
    module = subject.module()
    for network in module.members:
        place_(network, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    return _opened(subject.info("packed"), module, threads)


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
