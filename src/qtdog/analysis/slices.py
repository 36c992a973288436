"""Where a model errs: confusion by domain, worst domain, worst class, and its surest mistakes; pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Confusion = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answer:
    """What a model said of one image.

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
class Slices:
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


def confusion(answers: Sequence[Answer], n_classes: int) -> Confusion:
    """Return how often each true class (row) was called each class (column), int64 (n_classes, n_classes).

    Example:
        >>> confusion([Answer("a", "1", 0, 1, 0.9), Answer("a", "2", 1, 1, 0.8)], 2).tolist()
        [[0, 1], [0, 1]]
    """
    table = np.zeros((n_classes, n_classes), dtype=np.int64)
    for answer in answers:
        table[answer.label, answer.predicted] += 1
    return table


def slices(tables: Mapping[str, Confusion], sources: Sequence[str], target: str | None) -> Slices:
    """Return the accuracy of a model by parts.

    Args:
        tables: confusion of each domain, with at least one image.
        sources: names of the source domains.
        target: the unseen domain, or None.

    Example:
        >>> tables = {"a": np.array([[3, 1], [0, 4]]), "b": np.array([[1, 1], [1, 1]])}
        >>> found = slices(tables, ["a"], "b")
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
    return Slices(
        accuracy=accuracy,
        worst_domain=min(accuracy, key=lambda name: accuracy[name]),
        source_accuracy=source,
        target_accuracy=reached,
        gap=None if reached is None else source - reached,
        worst_class=worst_class,
        worst_class_accuracy=by_class[worst_class],
        worst_cell=(domain, cell, *cells[domain, cell]),
    )


def surest_mistakes(answers: Sequence[Answer], n: int) -> list[Answer]:
    """Return the n wrong answers of the highest confidence, surest first, ties by name.

    Example:
        >>> wrong = [Answer("a", "1", 0, 1, 0.6), Answer("a", "2", 0, 1, 0.9), Answer("a", "3", 1, 1, 1.0)]
        >>> [answer.key for answer in surest_mistakes(wrong, 5)]
        ['2', '1']
    """
    wrong = [answer for answer in answers if answer.predicted != answer.label]
    return sorted(wrong, key=lambda answer: (-answer.confidence, answer.key))[:n]
