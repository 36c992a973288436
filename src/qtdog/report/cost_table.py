"""Accuracy beside what it costs: size of the file, updates in training, forward passes per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtdog.report.table import size_text, target_table

Result = Mapping[str, Any]


def cost_table(results: Mapping[str, Sequence[Result]]) -> tuple[list[str], list[list[str]]]:
    """Return `report.table.target_table` with a column for training steps and one for forward passes.

    Args:
        results: by the name of a row, results of runs (with `training_steps`) or of ensembles, as in `result.json`; of
            several for one target the accuracies are averaged, and the cost is that of one.
    """
    headers, rows = target_table(results)
    costs = [[file_text(runs[0]["size"]), steps_text(runs[0]), passes_text(runs[0])] for runs in results.values()]
    rows = [[*row[:-1], *cost] for row, cost in zip(rows, costs, strict=True)]
    return [*headers, "training steps", "passes"], rows


def file_text(size: Mapping[str, float]) -> str:
    """Return the size of a file; that of an ensemble beside one of its members in float32.

    Example:
        >>> file_text({"bytes": 16_392_920, "ratio": 0.84, "float32_models": 1.195})
        '16.4 MB (1.20x one float32)'
    """
    if "float32_models" not in size:
        return size_text(size)
    return f"{size['bytes'] / 1e6:.3g} MB ({size['float32_models']:.2f}x one float32)"


def steps_text(result: Result) -> str:
    """Return the updates behind a model, and in lengths of one run if that is another number.

    Example:
        >>> steps_text({"training_steps": 17_000, "training_runs": 3.4})
        '17,000 (3.4 runs)'
    """
    runs = result.get("training_runs", 1.0)
    text = f"{result['training_steps']:,}"
    return text if runs == 1 else f"{text} ({runs:.3g} runs)"


def passes_text(result: Result) -> str:
    """Return the forward passes per image.

    Example:
        >>> passes_text({}), passes_text({"inference_passes": 5})
        ('1', '5')
    """
    return str(result.get("inference_passes", 1))


def cost_line(size: Mapping[str, float], result: Result) -> str:
    """Return size, training and passes of a model in one line.

    Example:
        >>> size = {"bytes": 16_392_920, "ratio": 0.84, "float32_models": 1.195}
        >>> cost_line(size, {"training_steps": 17_000, "training_runs": 3.4, "inference_passes": 5})
        '16.4 MB (1.20x one float32), training steps 17,000 (3.4 runs), forward passes per image 5'
    """
    passes = passes_text(result)
    return f"{file_text(size)}, training steps {steps_text(result)}, forward passes per image {passes}"
