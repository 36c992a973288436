"""Where finished runs err, by domain and class, with their surest mistakes as pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from qtdog.analysis.analyzed_run import AnalyzedRun, Images, domain_images, logits
from qtdog.analysis.gradcam import show_image
from qtdog.analysis.measurements import (
    AnalysisResult,
    Measurements,
    escape_dollar,
    panels,
    save_figure,
    write_result,
    write_table,
)
from qtdog.core.progress import Progress

Confusion = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoredImage:
    """What a model predicted of one image.

    Attributes:
        domain: of the image.
        key: its name in the data set.
        label: true class, a position.
        predicted: class with the highest probability.
        confidence: that probability.
    """

    domain: str
    key: str
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True)
class DomainErrors:
    """The accuracy of a model by parts.

    Attributes:
        accuracy: by domain.
        worst_domain: the one with the lowest, ties to the first.
        source_accuracy: mean over the sources, each counting once.
        target_accuracy: of the target, or None.
        gap: source - target accuracy, or None.
        worst_class: position of the class with the lowest mean accuracy over the domains that have it.
        worst_class_accuracy: that mean.
        worst_cell: domain and class with the lowest accuracy, its accuracy and its images.
    """

    accuracy: dict[str, float]
    worst_domain: str
    source_accuracy: float
    target_accuracy: float | None
    gap: float | None
    worst_class: int
    worst_class_accuracy: float
    worst_cell: tuple[str, int, float, int]


def confusion(answers: Sequence[ScoredImage], n_classes: int) -> Confusion:
    """Return how often each true class (row) was called each class (column), int64 (n_classes, n_classes).

    Example:
        >>> confusion([ScoredImage("a", "1", 0, 1, 0.9), ScoredImage("a", "2", 1, 1, 0.8)], 2).tolist()
        [[0, 1], [0, 1]]
    """
    table = np.zeros((n_classes, n_classes), dtype=np.int64)
    for answer in answers:
        table[answer.label, answer.predicted] += 1
    return table


def domain_errors(tables: Mapping[str, Confusion], sources: Sequence[str], target: str | None) -> DomainErrors:
    """Return the accuracy of a model by parts.

    Args:
        tables: confusion of each domain, with at least one image.
        sources: names of the source domains.
        target: the unseen domain, or None.

    Example:
        >>> tables = {"a": np.array([[3, 1], [0, 4]]), "b": np.array([[1, 1], [1, 1]])}
        >>> found = domain_errors(tables, ["a"], "b")
        >>> found.worst_domain, found.gap, found.worst_class
        ('b', 0.375, 0)
    """
    accuracy = {domain: float(table.trace() / table.sum()) for domain, table in tables.items()}
    cells = {
        (domain, c): (float(table[c, c] / table[c].sum()), int(table[c].sum()))
        for domain, table in tables.items()
        for c in range(len(table))
        if table[c].sum()
    }
    by_class = {c: np.mean([cells[key][0] for key in cells if key[1] == c]).item() for c in {key[1] for key in cells}}
    source = sum(accuracy[domain] for domain in sources) / len(sources)
    reached = None if target is None else accuracy[target]
    worst_class = min(sorted(by_class), key=lambda c: by_class[c])
    domain, cell = min(cells, key=lambda key: cells[key][0])
    return DomainErrors(
        accuracy=accuracy,
        worst_domain=min(accuracy, key=lambda name: accuracy[name]),
        source_accuracy=source,
        target_accuracy=reached,
        gap=None if reached is None else source - reached,
        worst_class=worst_class,
        worst_class_accuracy=by_class[worst_class],
        worst_cell=(domain, cell, *cells[domain, cell]),
    )


def surest_mistakes(answers: Sequence[ScoredImage], n: int) -> list[ScoredImage]:
    """Return the n wrong answers of the highest confidence, surest first, ties by name.

    Example:
        >>> given = [("1", 0, 1, 0.6), ("2", 0, 1, 0.9), ("3", 1, 1, 1.0)]
        >>> wrong = [ScoredImage("a", *one) for one in given]
        >>> [answer.key for answer in surest_mistakes(wrong, 5)]
        ['2', '1']
    """
    wrong = [answer for answer in answers if answer.predicted != answer.label]
    return sorted(wrong, key=lambda answer: (-answer.confidence, answer.key))[:n]


N_COLUMNS = 6
INCHES = 1.6
MAX_NUMBERED = 12  # classes, up to which the cells hold their numbers


def draw_confusions(tables: Mapping[str, Confusion], run: AnalyzedRun, folder: Path, name: str) -> list[str]:
    """Draw the confusion of each domain: counts and, in color, shares of the true class; return the file names."""
    figure, axes = panels(len(tables), width=4.0, height=3.8)
    for axis, (domain, table) in zip(axes, tables.items(), strict=True):
        _matrix(axis, table, run.dataset.classes)
        role = "target" if domain == run.target else "source"
        axis.set_title(escape_dollar(f"{domain} ({role})"))
    axes[0].set_ylabel("true class")
    figure.suptitle(escape_dollar(run.label), fontsize=10)
    return save_figure(figure, folder, name)


def _matrix(axis: Axes, table: Confusion, classes: Sequence[str]) -> None:
    shares = 100 * table / np.maximum(table.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    if len(classes) <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(table):
            if count:
                color = "black" if shares[row, column] > 50 else "white"
                axis.text(column, row, f"{count}", ha="center", va="center", fontsize=7, color=color)
        names = [escape_dollar(name) for name in classes]
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("predicted class (images)")


def draw_mistakes(
    mistakes: Sequence[ScoredImage], images: Mapping[str, Images], run: AnalyzedRun, folder: Path, name: str
) -> list[str]:
    """Draw the images of wrong answers with their predictions; no file if there are none, or of texts."""
    if not mistakes or run.model.info.preprocessing.max_tokens:
        return []
    columns = min(N_COLUMNS, len(mistakes))
    rows = -(-len(mistakes) // columns)
    size = (INCHES * columns, (INCHES + 0.4) * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    flat = [axis for row in axes for axis in row]
    for axis in flat[len(mistakes) :]:
        axis.remove()
    classes = run.dataset.classes
    for axis, mistake in zip(flat, mistakes, strict=False):
        found = images[mistake.domain]
        show_image(axis, found.pixels[found.keys.index(mistake.key)].numpy())
        predicted = (
            f"predicted {classes[mistake.predicted]} ({100 * mistake.confidence:.0f} %)\nis {classes[mistake.label]}"
        )
        axis.set_title(escape_dollar(predicted), fontsize=7)
    figure.suptitle(escape_dollar(f"{run.label}: surest mistakes"), fontsize=9)
    return save_figure(figure, folder, name)


MISTAKE_COLUMNS = ("label", "predicted", "confidence")
CONFUSION = "confusion.csv"


def measure_errors(
    runs: Sequence[AnalyzedRun],
    folder: Path,
    *,
    n_images: int | None = None,
    n_mistakes: int = 24,
    seed: int = 0,
    progress: Progress = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Score every run on each domain, held-out images of the sources; return what `analysis.json` says.

    Args:
        runs: runs of one data set.
        folder: where points, tables and figures go.
        n_images: of each domain; None for all.
        n_mistakes: that are drawn: of the target, or of all domains of a run without one.
        seed: of the images.
        progress: reports domains.
        check: called before each batch; may raise to break off.

    Raises:
        RunError: the folder holds points of other settings, or cannot be written.
        ConfigError, DataError: as in `analysis.analyzed_run.domain_images`.
    """
    points = Measurements(folder, ("run", "domain", "image"), MISTAKE_COLUMNS, {"n_images": n_images, "seed": seed})
    numbers, figures, table = [], [], []
    total = sum(len(run.domains) for run in runs)
    done = 0
    for n, run in enumerate(runs):
        images = {}
        for domain in run.domains:
            images[domain] = domain_images(run, domain, n_images, seed)
            _measure(run, domain, images[domain], points, check)
            done += 1
            if progress is not None:
                progress(done, total)
        answers = _answers(run, points)
        tables = _tables(run, answers)
        numbers.append(_numbers(run, domain_errors(tables, run.protocol.sources, run.target)))
        table += _rows(run, tables)
        figures += draw_confusions(tables, run, folder, f"confusion-{n + 1}")
        shown = [answer for answer in answers if run.target in (None, answer.domain)]
        figures += draw_mistakes(surest_mistakes(shown, n_mistakes), images, run, folder, f"mistakes-{n + 1}")
    write_table(folder / CONFUSION, table)
    result = AnalysisResult(
        kind="errors",
        title="Where the runs err",
        settings={"n_images": n_images, "seed": seed},
        runs=[run.to_json() for run in runs],
        numbers=numbers,
        figures=figures,
        notes=("Held-out images of the sources; the target was never trained on. Every count is in confusion.csv.",),
    )
    return write_result(folder, result)


def _measure(run: AnalyzedRun, domain: str, images: Images, points: Measurements, check: Callable[[], None]) -> None:
    if all((run.id, domain, key) in points for key in images.keys):
        return
    best = logits(run.model, images, check=check).double().softmax(1).max(1)
    place = {name: c for c, name in enumerate(run.dataset.classes)}
    predicted = [place[run.model.info.classes[c]] for c in best.indices.tolist()]
    labels, surest = images.labels.tolist(), best.values.tolist()
    rows = [
        ((run.id, domain, key), values)
        for key, *values in zip(images.keys, labels, predicted, surest, strict=True)
        if (run.id, domain, key) not in points
    ]
    points.add_all_(rows)


def _answers(run: AnalyzedRun, points: Measurements) -> list[ScoredImage]:
    return [
        ScoredImage(row["domain"], row["image"], int(row["label"]), int(row["predicted"]), float(row["confidence"]))
        for row in points.of(run=run.id)
    ]


def _tables(run: AnalyzedRun, answers: Sequence[ScoredImage]) -> dict[str, Confusion]:
    n_classes = len(run.dataset.classes)
    return {
        domain: confusion([answer for answer in answers if answer.domain == domain], n_classes)
        for domain in run.domains
    }


def _numbers(run: AnalyzedRun, found: DomainErrors) -> dict[str, Any]:
    classes = run.dataset.classes
    domain, cell, accuracy, n = found.worst_cell
    return {
        "run": run.label,
        "source_accuracy": found.source_accuracy,
        "target_accuracy": found.target_accuracy,
        "gap": found.gap,
        "worst_domain": found.worst_domain,
        "worst_class": classes[found.worst_class],
        "worst_class_accuracy": found.worst_class_accuracy,
        "worst_cell": f"{classes[cell]} in {domain}",
        "worst_cell_accuracy": accuracy,
        "worst_cell_n": n,
    } | {f"accuracy of {name}": value for name, value in sorted(found.accuracy.items())}


def _rows(run: AnalyzedRun, tables: dict[str, Confusion]) -> list[dict[str, Any]]:
    classes = run.dataset.classes
    return [
        {"run": run.label, "domain": domain, "true": classes[t], "predicted": classes[p], "n": int(table[t, p])}
        for domain, table in tables.items()
        for t in range(len(classes))
        for p in range(len(classes))
    ]
