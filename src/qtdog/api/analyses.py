"""`qtdog.analyze`: questions to finished runs, each answered with numbers and figures.

found = qtdog.analyze.flatness(["runs/float", "runs/lsq"])
found.table()    # the numbers
found.plot()     # the figure
"""

from __future__ import annotations

import base64
import contextlib
import html
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from qtdog.analysis.analyzed_run import AnalyzedRun, open_analyzed_runs
from qtdog.analysis.errors_by_domain import measure_errors
from qtdog.analysis.flatness import RADII, FlatnessPlan, measure_flatness
from qtdog.analysis.gradcam import CamPlan, measure_cam
from qtdog.analysis.hessian import HessianPlan, measure_hessian
from qtdog.analysis.loss_surface import SurfacePlan, measure_surface
from qtdog.analysis.quantization_noise import measure_noise
from qtdog.analysis.stability import measure_stability
from qtdog.api.display import CountingBar, as_frame
from qtdog.api.notebook import SIGINT_CODE, RunResult, RunResults
from qtdog.api.python_words import in_python
from qtdog.core.errors import ConfigError, Interrupted, RunError
from qtdog.core.progress import Progress
from qtdog.runs.find import open_run
from qtdog.runs.finished import method_name, setting_labels, settings_of
from qtdog.training.stop import StopRequest

__all__ = ["Analysis", "cam", "errors", "flatness", "hessian", "noise", "stability", "surface"]

Runs = str | Path | RunResult | RunResults | Sequence[str | Path | RunResult]
ShowsCounts = bool | Callable[[int, int], None]
OUT = Path("analyses")


class Analysis:
    """What an analysis has found.

    Args:
        result: the content of its `analysis.json`.
        folder: where that is, with every measured point, a table, and the figures as PNG and PDF.
    """

    def __init__(self, result: Mapping[str, Any], folder: Path) -> None:
        self.result, self.folder = dict(result), folder

    @property
    def kind(self) -> str:
        """Which analysis it is, such as "flatness"."""
        return self.result["kind"]

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """The rows of the table, a dictionary each."""
        return list(self.result["numbers"])

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that a reader of the numbers must know."""
        return tuple(self.result["notes"])

    @property
    def figures(self) -> tuple[Path, ...]:
        """The pictures, as PNG files."""
        return tuple(self.folder / name for name in self.result["figures"] if name.endswith(".png"))

    def table(self) -> Any:
        """Return the numbers as a pandas DataFrame, or as they are where pandas is not installed."""
        return as_frame(self.numbers)

    def plot(self, number: int = 0) -> Image.Image:
        """Return a figure as a picture that a notebook shows; the PDF of the same lies beside it in `folder`.

        Raises:
            RunError: there is no such figure.
        """
        if number >= len(self.figures):
            raise RunError(f"this analysis has {len(self.figures)} figures; there is no figure {number}")
        return self._pictures[number]

    @cached_property
    def _pictures(self) -> list[Image.Image]:
        pictures = []
        for file in self.figures:
            with Image.open(file, formats=["PNG"]) as picture:
                pictures.append(picture.copy())
        return pictures

    def __repr__(self) -> str:
        return f"Analysis({self.result['title']}: {len(self.numbers)} numbers in {self.folder})"

    def _repr_html_(self) -> str | None:
        pictures = [base64.b64encode(file.read_bytes()).decode() for file in self.figures]
        parts = [as_frame(self.numbers, html=True) or "", *(f"<p>{html.escape(note)}</p>" for note in self.notes)]
        return "\n".join([*parts, *(f'<img src="data:image/png;base64,{text}">' for text in pictures)])


@in_python
def flatness(
    runs: Runs,
    *,
    num_directions: int = 100,
    radii: Sequence[float] = RADII["absolute"],
    filter_radii: Sequence[float] = RADII["filter"],
    num_images: int = 256,
    seed: int = 0,
    data: str | Path | None = None,
    out: str | Path = OUT,
    progress: ShowsCounts = True,
) -> Analysis:
    """Measure how much the loss rises at a distance γ from the weights, on sources and target (QT-DoG, Eq. 5).

    Args:
        runs: run folders or results of `qtdog.train`, of one data set.
        num_directions: random directions, in opposite pairs; both count.
        radii: in the units of the weights.
        filter_radii: as shares of each filter's length.
        num_images: of each domain; validation images of the sources.
        seed: of images and directions.
        data: where the data set lies now, if not where the runs found it.
        out: the answer is kept in `out/flatness`; the same call goes on there.
        progress: True for a bar, False for silence, or a function f(done, total).

    Returns:
        a row for each run, role, radius and γ.

    Raises:
        ConfigError: numbers that make no sense.
        RunError, DataError, FormatError, ModelError: as in `analysis.analyzed_run.open_analyzed_runs`.
        KeyboardInterrupt: Ctrl-C; what is measured is kept.

    Example:
        >>> import qtdog
        >>> runs, few = ["runs/float", "runs/lsq"], {"radii": [0, 10], "filter_radii": [], "num_images": 4}
        >>> found = qtdog.analyze.flatness(runs, num_directions=4, **few, progress=False)
        >>> sorted({row["run"] for row in found.numbers}), [file.suffix for file in found.figures]
        (['erm + float', 'erm + lsq 7 bit'], ['.png'])
        >>> shown = found.table(), found.plot()
    """
    given = {"absolute": tuple(sorted(set(radii))), "filter": tuple(sorted(set(filter_radii)))}
    plan = FlatnessPlan({kind: values for kind, values in given.items() if values}, num_directions, num_images, seed)
    with _measuring(runs, Path(out) / "flatness", progress) as ask:
        bar = ask.bar("passes over the images")
        result = measure_flatness(ask.opened(data), plan, ask.folder, progress=bar, check=ask.check)
    return Analysis(result, ask.folder)


@in_python
def hessian(
    runs: Runs,
    *,
    on: str = "sources",
    num_vectors: int = 500,
    error: float = 0.05,
    num_eigenvalues: int = 3,
    num_probes: int = 4,
    num_images: int = 64,
    seed: int = 0,
    data: str | Path | None = None,
    out: str | Path = OUT,
    progress: ShowsCounts = True,
) -> Analysis:
    """Measure the curvature of the loss at the weights that are saved: trace, largest eigenvalues, spectral density.

    Args:
        runs: run folders or results of `qtdog.train`, of one data set.
        on: "sources" (their validation images) or "target".
        num_vectors: random vectors of the trace, at most.
        error: standard error of the trace that is enough, as a share of it.
        num_eigenvalues: how many of the largest.
        num_probes: random vectors of the density; 0 for none. It needs curvlinops (extra `curvature`).
        num_images: of each domain.
        seed: of images and vectors.
        data: where the data set lies now, if not where the runs found it.
        out: the answer is kept in `out/hessian`; the same call goes on there.
        progress: True for a bar, False for silence, or a function f(done, total).

    Raises:
        ConfigError: numbers that make no sense, or the target of a run without one.
        RunError, DataError, FormatError, ModelError: as in `analysis.analyzed_run.open_analyzed_runs`.
        KeyboardInterrupt: Ctrl-C; what is measured is kept.
    """
    if on not in ("sources", "target"):
        raise ConfigError(f"on is 'sources' or 'target', not '{on}'")
    plan = HessianPlan(
        on=on,
        n_images=num_images,
        max_vectors=num_vectors,
        error_frac=error,
        n_eigenvalues=num_eigenvalues,
        n_probes=num_probes,
        seed=seed,
    )
    with _measuring(runs, Path(out) / "hessian", progress) as ask:
        bar = ask.bar("vectors, eigenvalues and probes")
        result = measure_hessian(ask.opened(data), plan, ask.folder, progress=bar, check=ask.check)
    return Analysis(result, ask.folder)


@in_python
def surface(
    runs: Runs,
    *,
    plane: bool = False,
    num_points: int = 21,
    reach: float = 0.25,
    num_images: int = 128,
    seed: int = 0,
    data: str | Path | None = None,
    out: str | Path = OUT,
    progress: ShowsCounts = True,
) -> Analysis:
    """Measure the loss around a run, or along the straight line between two.

    Args:
        runs: one or two run folders, or results of `qtdog.train`.
        plane: measure on a plane (num_points² passes over the images) instead of a line.
        num_points: measurements on each axis.
        reach: around one run, a share of each filter's length; between two, how far beyond them, as a share of their
            distance.
        num_images: of each domain.
        seed: of images and directions.
        data: where the data set lies now, if not where the runs found it.
        out: the answer is kept in `out/surface`; the same call goes on there.
        progress: True for a bar, False for silence, or a function f(done, total).

    Raises:
        ConfigError: more than two runs, or numbers that make no sense.
        RunError, DataError, FormatError, ModelError: as in `analysis.analyzed_run.open_analyzed_runs`.
        KeyboardInterrupt: Ctrl-C; what is measured is kept.

    Example:
        >>> import qtdog
        >>> found = qtdog.analyze.surface(["runs/float", "runs/lsq"], num_points=3, num_images=2, progress=False)
        >>> found.kind, len(found.figures)
        ('surface', 1)
    """
    plan = SurfacePlan(2 if plane else 1, num_points, reach, num_images, seed)
    with _measuring(runs, Path(out) / "surface", progress) as ask:
        bar = ask.bar("points of the surface")
        result = measure_surface(ask.opened(data), plan, ask.folder, progress=bar, check=ask.check)
    return Analysis(result, ask.folder)


@in_python
def noise(runs: Runs, *, out: str | Path = OUT, progress: ShowsCounts = True) -> Analysis:
    """Compare what rounding does to the weights with uniform noise: divergence, symmetry, clipped share, per layer.

    Args:
        runs: folders of quantized runs with their `checkpoint/`, or results of `qtdog.train`.
        out: the answer is kept in `out/noise`.
        progress: True for a bar, False for silence, or a function f(done, total).

    Raises:
        RunError: no folder of a finished run, a run without checkpoint, or a float run.
        ModelError: a grid without a common step size.
        KeyboardInterrupt: Ctrl-C; what is measured is kept.

    Example:
        >>> import qtdog
        >>> found = qtdog.analyze.noise("runs/lsq", progress=False)
        >>> found.kind, len(found.numbers) > 0
        ('noise', True)
    """
    with _measuring(runs, Path(out) / "noise", progress) as ask:
        result = measure_noise(ask.paths, ask.labels, ask.folder, progress=ask.bar("layers"), check=ask.check)
    return Analysis(result, ask.folder)


@in_python
def errors(
    runs: Runs,
    *,
    num_images: int | None = None,
    num_mistakes: int = 24,
    seed: int = 0,
    data: str | Path | None = None,
    out: str | Path = OUT,
    progress: ShowsCounts = True,
) -> Analysis:
    """Show where runs err: confusion by domain, worst domain, worst class, gap to the target, surest mistakes.

    Args:
        runs: run folders or results of `qtdog.train`, of one data set.
        num_images: of each domain; None for all.
        num_mistakes: surest mistakes on the target that are drawn.
        seed: of the images.
        data: where the data set lies now, if not where the runs found it.
        out: the answer is kept in `out/errors`; the same call goes on there.
        progress: True for a bar, False for silence, or a function f(done, total).

    Raises:
        RunError, DataError, FormatError, ModelError: as in `analysis.analyzed_run.open_analyzed_runs`.
        KeyboardInterrupt: Ctrl-C; what is measured is kept.

    Example:
        >>> import qtdog
        >>> found = qtdog.analyze.errors("runs/lsq", num_images=4, num_mistakes=1, progress=False)
        >>> found.kind, len(found.figures) > 0
        ('errors', True)
    """
    options = {"n_images": num_images, "n_mistakes": num_mistakes, "seed": seed}
    with _measuring(runs, Path(out) / "errors", progress) as ask:
        bar = ask.bar("domains")
        result = measure_errors(ask.opened(data), ask.folder, **options, progress=bar, check=ask.check)
    return Analysis(result, ask.folder)


@in_python
def cam(
    runs: Runs,
    *,
    domain: str | None = None,
    num_shown: int = 6,
    stage: int = -1,
    num_images: int = 32,
    seed: int = 0,
    data: str | Path | None = None,
    out: str | Path = OUT,
    progress: ShowsCounts = True,
) -> Analysis:
    """Map where runs find their evidence for the true class, on the same images, and test whether the maps are true.

    Args:
        runs: run folders or results of `qtdog.train`, of one data set.
        domain: whose images; None for the target.
        num_shown: images that are drawn.
        stage: which feature map: 0 is the first stage, -1 the last.
        num_images: that are scored.
        seed: of the images, and of the random order that maps are compared with.
        data: where the data set lies now, if not where the runs found it.
        out: the answer is kept in `out/cam`; the same call goes on there.
        progress: True for a bar, False for silence, or a function f(done, total).

    Raises:
        ConfigError: the runs see different images, have no such domain, or no such stage.
        ModelError: grad-cam is not installed (extra `cam`), or a backbone has no feature maps.
        RunError, DataError, FormatError: as in `analysis.analyzed_run.open_analyzed_runs`.
        KeyboardInterrupt: Ctrl-C; what is measured is kept.
    """
    plan = CamPlan(domain, num_images, num_shown, stage, seed)
    with _measuring(runs, Path(out) / "cam", progress) as ask:
        result = measure_cam(ask.opened(data), plan, ask.folder, progress=ask.bar("maps"), check=ask.check)
    return Analysis(result, ask.folder)


@in_python
def stability(runs: Runs, *, seed: int = 0, out: str | Path = OUT) -> Analysis:
    """Draw accuracy over the steps of runs, and measure how far selection on the sources can be trusted.

    Args:
        runs: run folders, finished or not, or results of `qtdog.train`.
        seed: of the resamples of the interval.
        out: the answer is kept in `out/stability`.

    Raises:
        RunError: no folder of a run, or one without an evaluation.
        DataError: the runs have different data sets.

    Example:
        >>> import qtdog
        >>> found = qtdog.analyze.stability(["runs/float", "runs/lsq"])
        >>> found.kind, len(found.numbers)
        ('stability', 2)
    """
    folder, paths = Path(out) / "stability", run_paths(runs)
    return Analysis(measure_stability(paths, labels_of(paths), folder, seed=seed), folder)


class _Measuring:
    """The runs of one analysis, and how it reports."""

    def __init__(self, runs: Runs, folder: Path, progress: ShowsCounts, check: Callable[[], None]) -> None:
        self.paths, self.folder, self.check, self._progress = run_paths(runs), folder, check, progress
        self.labels = labels_of(self.paths)

    def bar(self, title: str) -> Progress:
        """Return a bar with a title, or nothing where none is wanted."""
        if callable(self._progress):
            return self._progress
        return CountingBar(title) if self._progress else None

    def opened(self, data: str | Path | None) -> list[AnalyzedRun]:
        """Return the runs, their models on the device of this machine."""
        device: torch.device = Accelerator().device
        source = None if data is None else str(data)
        bar = self.bar("reading images")
        return open_analyzed_runs(self.paths, self.labels, data=source, device=device, progress=bar)


@contextlib.contextmanager
def _measuring(runs: Runs, folder: Path, progress: ShowsCounts) -> Iterator[_Measuring]:
    try:
        with StopRequest() as stop:
            yield _Measuring(runs, folder, progress, stop.check_interrupt)
    except Interrupted as error:
        text = f"stopped; what is measured is kept in {folder}, and the same command goes on from there"
        if error.exit_code == SIGINT_CODE:
            raise KeyboardInterrupt(text) from error
        again = Interrupted(text)
        again.exit_code = error.exit_code
        raise again from error


def run_paths(runs: Runs) -> list[Path]:
    """Return the folders of runs; of results of `qtdog.train` those that they lie in.

    Example:
        >>> run_paths("runs/a"), run_paths(["runs/a", "runs/b"])
        ([PosixPath('runs/a')], [PosixPath('runs/a'), PosixPath('runs/b')])
    """
    several = [runs] if isinstance(runs, (str, Path, RunResult)) else list(runs)
    return [run.folder if isinstance(run, RunResult) else Path(run) for run in several]


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Return a name for each run: its method and settings, and what else tells it from the others.

    Raises:
        ConfigError: a run is named twice.
        RunError: no folder of a run.
    """
    twice = [path for path, n in Counter(path.resolve() for path in paths).items() if n > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is named twice")
    configs = [open_run(path)[1] for path in paths]
    trees = [config.model_dump(mode="json") for config in configs]
    names = setting_labels([method_name(tree) for tree in trees], [settings_of(tree) for tree in trees])
    for details in (
        [f", {config.data.target} unseen" for config in configs],
        [f", trial {config.data.trial}" for config in configs],
        [f", seed {config.train.seed}" for config in configs],
        [f" ({path.name or path})" for path in paths],
    ):
        names = _distinct(names, details)
    return names


def _distinct(names: Sequence[str], details: Sequence[str]) -> list[str]:
    """Return names, each with its detail where runs of the same name differ in it."""
    found: dict[str, set[str]] = {}
    for name, detail in zip(names, details, strict=True):
        found.setdefault(name, set()).add(detail)
    return [name + detail if len(found[name]) > 1 else name for name, detail in zip(names, details, strict=True)]
