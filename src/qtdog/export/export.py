"""From a packed file to an exported one that is known to answer alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qtdog.core.errors import DataError, ModelError, RunError
from qtdog.core.files import sync_file, sync_folder, temporary_folder, umask
from qtdog.core.progress import Progress
from qtdog.export.formats import FORMATS, Format
from qtdog.export.inference_module import InferenceModule
from qtdog.export.int8 import calibrate_activations, plan_int8, quantize_, trained_ranges
from qtdog.export.integer_weight import IntegerWeight, refit
from qtdog.export.onnx_ensemble import join
from qtdog.export.onnx_graph import COMPUTED, find_codes, member_graphs, store_integers_
from qtdog.export.packed_source import ExportInfo, PackedSource
from qtdog.export.parity import ROUNDED, LabelledImages, Parity, measure_parity
from qtdog.export.runtimes import open_packed_source, open_points, open_runtime

Watch = Callable[[str], Progress]
"""From the title of a long piece of work to the callback that reports its progress."""


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
        files = {"file": str(self.path), "bytes": self.n_bytes, "packed_bytes": self.packed_bytes}
        return files | self.info.model_dump(mode="json")


def export(
    source: PackedSource,
    out: Path,
    name: str,
    images: LabelledImages,
    *,
    calibration: LabelledImages | None = None,
    n_calibration: int = 256,
    watch: Watch = lambda title: None,
) -> Exported:
    """Write a packed model to another format, and keep the file only if it answers like the packed model.

    A description of the file (`OUT.json`) goes beside it.

    Args:
        source: the packed model.
        out: the file to write; an existing one is replaced when the new one has passed.
        name: of the format, in `FORMATS`.
        images: source images, to compare on (`export.parity.draw_export_images`).
        calibration: source images that set the ranges of integer activations; None for the first `n_calibration` (at
            most half) of `images`, which are not compared then. Not used by float formats.
        n_calibration: see there.
        watch: shows how far the work is.

    Raises:
        DataError: fewer than 2 images.
        ModelError: a library is missing, an operator has no form in the format, or a float model is to become integer.
        RunError: the file does not answer like the packed model (nothing is left), or cannot be written.
    """
    kind = FORMATS[name]
    _check(source, kind, images)
    check = images
    if not kind.integer:
        calibration = None
    elif calibration is None:
        calibration, check = images.split(min(n_calibration, len(images.pixels) // 2))
    info = source.info(name)
    with temporary_folder(out) as folder:
        graph: Any = None
        if kind.graph:
            graph, info = make_graph(source, info, calibration, watch)
        elif calibration is not None:
            graph, info = _integer_networks(source, info, calibration, watch("calibrating"))
        draft = folder / out.name
        kind.save(source, graph, draft, info)
        parity = verify_export(source, draft, check, kind, out=out, watch=watch)
        info = info.model_copy(update={"parity": asdict(parity)})
        kind.save(source, graph, draft, info)
        n_bytes = sum(file.stat().st_size for file in folder.iterdir())
        made = Exported(out, info, parity, n_bytes, source.path.stat().st_size)
        (folder / f"{out.name}.json").write_text(json.dumps(made.to_json(), indent=1))
        _move(folder, out)
    return made


def _check(source: PackedSource, kind: Format, images: LabelledImages) -> None:
    if len(images.pixels) < 2:
        raise DataError(f"an export is checked on images, at least 2; there are {len(images.pixels)}")
    if kind.integer and not source.codes():
        text = f"{source.path} is a float model: it has no integer codes to compute with"
        raise ModelError(f"{text}. Train with --quantizer, or export it to a float format")


def make_graph(
    source: PackedSource, info: ExportInfo, calibration: LabelledImages | None, watch: Watch = lambda title: None
) -> tuple[Any, ExportInfo]:
    """Return the ONNX graph (`onnx_ir.Model`) of a packed model, compared with nothing yet, and its description.

    Args:
        source: the packed model.
        info: its description.
        calibration: source images that set the ranges of integer activations; None for float ones.
        watch: shows how far the work is.

    Raises:
        ModelError: as in `export`.
    """
    # integer activations are made of a float graph: their grids replace the rounding that the module would show
    module = source.module(float_activations=calibration is not None)
    graphs = list(member_graphs(source, module, watch("translating")))
    codes = [find_codes(graph, member.quantized) for graph, member in zip(graphs, source.members, strict=True)]
    if calibration is not None:
        computed = [refit_computed_(graph, found) for graph, found in zip(graphs, codes, strict=True)]
        rounded, n_integer, n_products = _quantize_(graphs, codes, module, calibration, source, watch("calibrating"))
        done = {"calibration": _calibration(calibration), "integer_products": (n_integer, n_products)}
        info = info.model_copy(update=done | {"notes": _notes(rounded, sum(computed))})
    for graph, found in zip(graphs, codes, strict=True):
        left = {name: weight for name, weight in found.items() if name in graph.graph.initializers}
        store_integers_(graph, left)
    return join(source, module, graphs), info


def _quantize_(
    graphs: list[Any],
    codes: list[dict[str, IntegerWeight]],
    module: InferenceModule,
    images: LabelledImages,
    source: PackedSource,
    progress: Progress,
) -> tuple[list[str], int, int]:
    """Make each member compute in integers, in place.

    Returns:
        The weights that had to be rounded again, products in integers, and all products.

    Raises:
        ModelError: no product can become integer.
    """
    plans = [plan_int8(graph, found) for graph, found in zip(graphs, codes, strict=True)]
    n_integer, n_products = sum(len(plan.nodes) for plan in plans), sum(plan.n_products for plan in plans)
    if not n_integer:
        text = (
            f"{source.path}: none of its {n_products} products could become integer: no convolution (of other than the"
        )
        raise ModelError(f"{text} transposed kind) or matrix product has weights with codes. Export to a float format")
    rounded: list[str] = []
    for index, (graph, found, plan) in enumerate(zip(graphs, codes, plans, strict=True)):
        names = list(plan.points)
        read = _reader(module, open_points(graph, names))
        ranges = calibrate_activations(names, read, images.pixels, progress=_part(progress, index, len(graphs)))
        ranges |= trained_ranges(plan, source.grids(index))
        rounded += [f"members.{index}.{name}" for name in quantize_(graph, plan, found, ranges)]
    return rounded, n_integer, n_products


def _integer_networks(
    source: PackedSource, info: ExportInfo, calibration: LabelledImages, progress: Progress
) -> tuple[Any, ExportInfo]:
    from qtdog.export.executorch_int8 import integer_networks  # its libraries take seconds

    networks, rounded, products = integer_networks(source, calibration.pixels, progress)
    done = {"calibration": _calibration(calibration), "integer_products": products, "notes": _notes(rounded, 0)}
    return networks, info.model_copy(update=done)


def refit_computed_(graph: Any, found: dict[str, IntegerWeight]) -> int:
    """Add integers for the weights that were computed from others with codes, and return how many."""
    names = [name for name in graph.meta.get(COMPUTED, []) if name not in found]
    for name in names:
        found[name] = refit(graph.graph.initializers[name].const_value.numpy())
    return len(names)


def _reader(module: InferenceModule, read: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    @torch.inference_mode()
    def prepared(images: Any) -> list[Any]:
        return read(module.prepare(torch.from_numpy(images)).numpy())

    return prepared


def _part(progress: Progress, index: int, n_parts: int) -> Progress:
    """Return what shows part `index` of several equal ones."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, n_parts * total)


def _calibration(images: LabelledImages) -> dict[str, Any]:
    about = {"domains": list(images.domains), "n_images": len(images.pixels), "method": "mse"}
    return about | {"target_included": images.target_included}


def _notes(rounded: list[str], n_computed: int) -> tuple[str, ...]:
    standardized = f"{n_computed} standardized weights were rounded again to 7 bits, because they lie on no grid"
    if not rounded:
        return (standardized,) if n_computed else ()
    text = f"{len(rounded)} weights were rounded again to 7 bits, because their grid has none of the codes -64 … 64"
    names = f"{', '.join(rounded[:3])}{', …' if len(rounded) > 3 else ''}"
    return (f"{text}: {names}", *([standardized] if n_computed else []))


def verify_export(
    source: PackedSource, draft: Path, images: LabelledImages, kind: Format, *, out: Path, watch: Watch
) -> Parity:
    """Return how an exported file compares with the packed model on the same images.

    Raises:
        RunError: beyond the limits of its format.
    """
    threads = torch.get_num_threads()
    packed = open_packed_source(source, threads)
    parity = measure_parity(packed, open_runtime(draft, threads=threads), images, watch("comparing"))
    rounds = not kind.integer and any(info.activations for info in source.infos)
    problems = parity.problems(ROUNDED if rounds else kind.limits)
    if problems:
        text = f"{out} was not written: as {kind.title} it does not answer like the packed model"
        raise RunError(f"{text} on {parity.n_images} images: {'; '.join(problems)}")
    return parity


def _move(folder: Path, out: Path) -> None:
    """Move what was written to its place; a process killed meanwhile leaves no files of two exports together."""
    about = f"{out.name}.json"
    files = sorted(folder.iterdir(), key=lambda file: (file.name == about, file.name == out.name))
    for file in files:
        sync_file(file)
        file.chmod(0o666 & ~umask())
    (out.parent / about).unlink(missing_ok=True)
    if len(files) > 2:  # with weights in a file of their own
        out.unlink(missing_ok=True)
    for file in files:
        file.replace(out.parent / file.name)
    sync_folder(out.parent)
