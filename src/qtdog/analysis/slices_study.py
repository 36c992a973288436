"""Where finished runs err, by domain and class, with their surest mistakes as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtdog.analysis.outcome import Outcome, write_outcome
from qtdog.analysis.passes import logits
from qtdog.analysis.points import Points, write_table
from qtdog.analysis.slices import Answer, Confusion, Slices, confusion, slices, surest_mistakes
from qtdog.analysis.slices_figure import draw_confusions, draw_mistakes
from qtdog.analysis.subject import Images, Subject, domain_images
from qtdog.core.progress import Progress

COLUMNS = ("label", "predicted", "confidence")
CONFUSION = "confusion.csv"


def measure_slices(
    subjects: Sequence[Subject],
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
        subjects: runs of one data set.
        folder: where points, tables and figures go.
        n_images: of each domain; None for all.
        n_mistakes: that are drawn: of the target, or of all domains of a run without one.
        seed: of the images.
        progress: is told of domains.
        check: called before each batch; may raise to break off.

    Raises:
        RunError: the folder holds points of other settings, or cannot be written.
        ConfigError, DataError: as in `analysis.subject.domain_images`.
    """
    points = Points(folder, ("run", "domain", "image"), COLUMNS, {"n_images": n_images, "seed": seed})
    numbers, figures, table = [], [], []
    total = sum(len(subject.domains) for subject in subjects)
    done = 0
    for n, subject in enumerate(subjects):
        images = {}
        for domain in subject.domains:
            images[domain] = domain_images(subject, domain, n_images, seed)
            _measure(subject, domain, images[domain], points, check)
            done += 1
            if progress is not None:
                progress(done, total)
        answers = _answers(subject, points)
        tables = _tables(subject, answers)
        numbers.append(_numbers(subject, slices(tables, subject.problem.sources, subject.target)))
        table += _rows(subject, tables)
        figures += draw_confusions(tables, subject, folder, f"confusion-{n + 1}")
        shown = [answer for answer in answers if subject.target in (None, answer.domain)]
        figures += draw_mistakes(surest_mistakes(shown, n_mistakes), images, subject, folder, f"mistakes-{n + 1}")
    write_table(folder / CONFUSION, table)
    outcome = Outcome(
        kind="slices",
        title="Where the runs err",
        settings={"n_images": n_images, "seed": seed},
        runs=[subject.to_json() for subject in subjects],
        numbers=numbers,
        figures=figures,
        notes=("Held-out images of the sources; the target was never trained on. Every count is in confusion.csv.",),
    )
    return write_outcome(folder, outcome)


def _measure(subject: Subject, domain: str, images: Images, points: Points, check: Callable[[], None]) -> None:
    if all((subject.id, domain, key) in points for key in images.keys):
        return
    best = logits(subject.model, images, check=check).double().softmax(1).max(1)
    place = {name: c for c, name in enumerate(subject.dataset.classes)}
    said = [place[subject.model.info.classes[c]] for c in best.indices.tolist()]
    labels, surest = images.labels.tolist(), best.values.tolist()
    rows = [
        ((subject.id, domain, key), values)
        for key, *values in zip(images.keys, labels, said, surest, strict=True)
        if (subject.id, domain, key) not in points
    ]
    points.add_all_(rows)


def _answers(subject: Subject, points: Points) -> list[Answer]:
    return [
        Answer(row["domain"], row["image"], int(row["label"]), int(row["predicted"]), float(row["confidence"]))
        for row in points.of(run=subject.id)
    ]


def _tables(subject: Subject, answers: Sequence[Answer]) -> dict[str, Confusion]:
    n_classes = len(subject.dataset.classes)
    return {
        domain: confusion([answer for answer in answers if answer.domain == domain], n_classes)
        for domain in subject.domains
    }


def _numbers(subject: Subject, found: Slices) -> dict[str, Any]:
    classes = subject.dataset.classes
    domain, cell, accuracy, n = found.worst_cell
    return {
        "run": subject.label,
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


def _rows(subject: Subject, tables: dict[str, Confusion]) -> list[dict[str, Any]]:
    classes = subject.dataset.classes
    return [
        {"run": subject.label, "domain": domain, "true": classes[t], "predicted": classes[p], "n": int(table[t, p])}
        for domain, table in tables.items()
        for t in range(len(classes))
        for p in range(len(classes))
    ]
