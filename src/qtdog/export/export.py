"""From a packed file to an exported one that is known to answer alike."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qtdog.core.errors import DataError, ModelError, RunError
from qtdog.core.files import clear_disk_errors, sync_file, sync_folder, write_atomic
from qtdog.export.formats import FORMATS, Format
from qtdog.export.images import LabelledImages
from qtdog.export.inference_module import InferenceModule
from qtdog.export.info import ExportInfo
from qtdog.export.int8 import calibrate_activations, plan_int8, quantize_
from qtdog.export.integer_weight import IntegerWeight
from qtdog.export.onnx_ensemble import join
from qtdog.export.onnx_graph import find_codes, member_graphs, store_integers_
from qtdog.export.packed_source import PackedSource
from qtdog.export.parity import Parity, compare
from qtdog.export.runtimes import open_packed_source, open_points, open_runtime

Told = Callable[[int, int], None] | None
Watch = Callable[[str], Told]
"""From the title of something that takes long to what is told how far it is."""


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        path: the file.
        info: its description, with calibration and parity.
        parity: how it compares with the packed model.
        n_bytes: on disk, all files together.
        packed_bytes: of the packed file.
    """

    path: Path
    info: ExportInfo
    parity: Parity
    n_bytes: int
    packed_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        told = {"file": str(self.path), "bytes": self.n_bytes, "packed_bytes": self.packed_bytes}
        return told | self.info.model_dump(mode="json")


def export(
    source: PackedSource,
    out: Path,
    name: str,
    images: LabelledImages,
    *,
    n_calibration: int = 256,
    watch: Watch = lambda title: None,
) -> Exported:
    """Write a packed model to another format, and keep the file only if it answers like the packed model.

    A description of the file (`OUT.json`) goes beside it.

    Args:
        source: the packed model.
        out: the file to write; an existing one is replaced when the new one has passed.
        name: of the format, in `FORMATS`.
        images: source images: the first `n_calibration` (at most half) set the ranges of integer activations, the
            others are compared.
        n_calibration: see there; not used by float formats.
        watch: shows how far the work is.

    Raises:
        DataError: fewer than 2 images.
        ModelError: a library is missing, an operator has no form in the format, or a float model is to become integer.
        RunError: the file does not answer like the packed model (nothing is left), or cannot be written.
    """
    kind = FORMATS[name]
    _check(source, kind, images)
    n_first = min(n_calibration, len(images.pixels) // 2)
    calibration, check = images.split(n_first) if kind.integer else (None, images)
    info = source.info(name)
    with clear_disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        try:
            graph, info = _graph(source, info, calibration, watch) if kind.graph else (None, info)
            draft = folder / out.name
            kind.save(source, graph, draft, info)
            parity = _measure(source, draft, check, watch)
            _refuse(out, parity, kind)
            info = info.model_copy(update={"parity": asdict(parity)})
            kind.save(source, graph, draft, info)
            n_bytes = sum(file.stat().st_size for file in folder.iterdir())
            _move(folder, draft, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    made = Exported(out, info, parity, n_bytes, source.path.stat().st_size)
    write_atomic(out.with_name(f"{out.name}.json"), json.dumps(made.to_json(), indent=1))
    return made


def _check(source: PackedSource, kind: Format, images: LabelledImages) -> None:
    if len(images.pixels) < 2:
        raise DataError(f"an export is checked on images, at least 2; there are {len(images.pixels)}")
    if kind.integer and not source.codes():
        text = f"{source.path} is a float model: it has no integer codes to compute with"
        raise ModelError(f"{text}. Train with --quantizer, or export it to a float format")


def _graph(
    source: PackedSource, info: ExportInfo, calibration: LabelledImages | None, watch: Watch
) -> tuple[Any, ExportInfo]:
    module = source.module()
    graphs = list(member_graphs(source, module, watch("translating")))
    codes = [find_codes(graph, member.quantized) for graph, member in zip(graphs, source.members, strict=True)]
    if calibration is not None:
        rounded = _quantize_(graphs, codes, module, calibration, watch("calibrating"))
        info = info.model_copy(update={"calibration": _told(calibration), "notes": _notes(rounded)})
    for graph, found in zip(graphs, codes, strict=True):
        left = {name: weight for name, weight in found.items() if name in graph.graph.initializers}
        store_integers_(graph, left)
    return join(source, module, graphs), info


def _quantize_(
    graphs: list[Any],
    codes: list[dict[str, IntegerWeight]],
    module: InferenceModule,
    images: LabelledImages,
    progress: Told,
) -> list[str]:
    """Make each member compute in integers, in place, and return the weights that had to be rounded again."""
    rounded: list[str] = []
    for index, (graph, found) in enumerate(zip(graphs, codes, strict=True)):
        plan = plan_int8(graph, found)
        names = list(plan.points)
        read = _reader(module, open_points(graph, names))
        ranges = calibrate_activations(names, read, images.pixels, progress=_part(progress, index, len(graphs)))
        rounded += [f"members.{index}.{name}" for name in quantize_(graph, plan, found, ranges)]
    return rounded


def _reader(module: InferenceModule, read: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    @torch.inference_mode()
    def prepared(images: Any) -> list[Any]:
        return read(module.prepare(torch.from_numpy(images)).numpy())

    return prepared


def _part(progress: Told, index: int, n_parts: int) -> Told:
    """Return what shows part `index` of several equal ones."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, n_parts * total)


def _told(calibration: LabelledImages) -> dict[str, Any]:
    told = {"domains": list(calibration.domains), "n_images": len(calibration.pixels), "method": "mse"}
    return told | {"target_included": calibration.target_included}


def _notes(rounded: list[str]) -> tuple[str, ...]:
    if not rounded:
        return ()
    text = f"{len(rounded)} weights were rounded again to 7 bits, because their grid has none of the codes -64 … 64"
    return (f"{text}: {', '.join(rounded[:3])}{', …' if len(rounded) > 3 else ''}",)


def _measure(source: PackedSource, draft: Path, images: LabelledImages, watch: Watch) -> Parity:
    threads = torch.get_num_threads()
    packed = open_packed_source(source, threads)
    return compare(packed, open_runtime(draft, threads=threads), images, watch("comparing"))


def _refuse(out: Path, parity: Parity, kind: Format) -> None:
    problems = parity.problems(kind.limits)
    if problems:
        text = f"{out} was not written: as {kind.title} it does not answer like the packed model"
        raise RunError(f"{text} on {parity.n_images} images: {'; '.join(problems)}")


def _move(folder: Path, draft: Path, out: Path) -> None:
    """Move what was written to its place, the file that names the others last."""
    for file in sorted(folder.iterdir(), key=lambda file: file == draft):
        sync_file(file)
        file.chmod(0o644)
        file.replace(out.parent / file.name)
    sync_folder(out.parent)
