"""What the index knows of one run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qtdog.core.config import AFTER_TRAINING, Config
from qtdog.runs.folder import RunFolder
from qtdog.sweep.notes import Outcome, last_line

Value = str | int | float | None
Row = dict[str, Value]

# Column → SQLite type, in the order in which they are shown; study, method and labels are in a table of their own.
COLUMNS = {
    "folder": "TEXT PRIMARY KEY",
    "kind": "TEXT",
    "state": "TEXT",
    "dataset": "TEXT",
    "target": "TEXT",
    "seed": "INTEGER",
    "trial": "INTEGER",
    "backbone": "TEXT",
    "objective": "TEXT",
    "step_rule": "TEXT",
    "feature_layer": "TEXT",
    "averager": "TEXT",
    "quantizer": "TEXT",
    "bits": "INTEGER",
    "schedule": "TEXT",
    "lr": "REAL",
    "image_size": "INTEGER",
    "batch_size": "INTEGER",
    "steps": "INTEGER",
    "start_step": "INTEGER",
    "step": "INTEGER",
    "selected_step": "INTEGER",
    "source_accuracy": "REAL",
    "test_accuracy": "REAL",
    "mean_after_start": "REAL",
    "std_after_start": "REAL",
    "size_bytes": "INTEGER",
    "trained_s": "REAL",
    "members": "INTEGER",
    "error": "TEXT",
    "config": "TEXT",
}
AVERAGED_AT_END = ("swa", "swad", "bma")  # until then evaluations are of the raw weights
VERSION = 2  # of what `read_row` computes, so that an older index is read anew
FILES = ("config.yaml", "metrics.jsonl", "result.json", "diagnosis.json")


def signature(folder: Path) -> str:
    """Return what changes whenever a run folder's row could: times and sizes of its small files."""
    parts = [f"v{VERSION}"]
    for name in FILES:
        try:
            stat = (folder / name).stat()
            parts.append(f"{name}:{stat.st_mtime_ns}:{stat.st_size}")
        except OSError:
            continue
    return " ".join(parts)


def read_row(folder: Path, failure: Outcome | None = None) -> Row | None:
    """Return what is known of the run or ensemble in a folder; None if it holds neither, or files that are damaged.

    Accuracies are fractions. `mean_after_start` and `std_after_start` (of the population) are over the evaluations
    behind the start step, for a float run behind 40 % of the steps; None where such evaluations are not of what ships:
    with SWA, SWAD and BMA, quantizers that work after training, and INQ, which has not frozen all by then. `step` is
    that of the last evaluation, `state` one of done, failed and unfinished.

    Args:
        folder: of the run.
        failure: why the sweep could not do it, if that is known.
    """
    try:
        result = _json(folder / "result.json")
        tree = yaml.load((folder / "config.yaml").read_text(), yaml.CSafeLoader) if _has_config(folder) else None
        if tree is None:
            return _ensemble_row(folder, result) if result and "members" in result else None
        row = _config_row(Config.model_validate(tree)) | _result_row(result)
        row |= _metrics_row(RunFolder(folder).metrics_file, row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
    row |= {"kind": "prefix" if folder.name.startswith("prefix-") else "run", "folder": str(folder)}
    row |= _state_row(folder, result, failure)
    return row


def _has_config(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _json(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _state_row(folder: Path, result: dict[str, Any] | None, failure: Outcome | None) -> Row:
    if result is not None:
        return {"state": "done", "error": None}
    diagnosis = _json(folder / "diagnosis.json")
    reason = failure.reason if failure else diagnosis["text"] if diagnosis else None
    return {"state": "failed" if reason else "unfinished", "error": reason}


def _config_row(config: Config) -> Row:
    quantizer = config.quantizer.name
    return {
        "target": config.data.target,
        "seed": config.train.seed,
        "trial": config.data.trial,
        "backbone": config.model.backbone,
        "objective": config.objective.name,
        "step_rule": config.step_rule.name,
        "feature_layer": config.model.feature_layer,
        "averager": config.averager.name,
        "quantizer": quantizer,
        "bits": None if quantizer == "none" else config.quantizer.bits,
        "schedule": config.optimizer.schedule,
        "lr": config.optimizer.lr,
        "image_size": config.data.image_size,
        "batch_size": config.data.batch_size,
        "steps": config.train.steps,
        "start_step": config.start_step if quantizer in AFTER_TRAINING or config.start_step is not None else None,
        "config": json.dumps(config.model_dump(mode="json")),
    }


def _result_row(result: dict[str, Any] | None) -> Row:
    if result is None:
        return {}
    keys = ("dataset", "selected_step", "source_accuracy", "test_accuracy", "trained_s")
    return {key: result.get(key) for key in keys} | {"size_bytes": result["size"]["bytes"], "members": 1}


def _metrics_row(file: Path, row: Row) -> Row:
    step = last_line(file).get("step")
    if not file.is_file() or row["quantizer"] in AFTER_TRAINING or row["averager"] in AVERAGED_AT_END:
        return {"step": step}
    start, steps = row["start_step"], row["steps"]
    first = int(0.4 * float(steps or 0)) if start is None else int(start)
    found: list[float] = []
    for line in file.read_text().splitlines():
        try:
            told = json.loads(line)
        except ValueError:  # cut off by a crash
            continue
        if told["step"] > first and told["test_accuracy"] is not None:
            if not told["selectable"]:
                return {"step": step}
            found.append(told["test_accuracy"])
    mean, std = _spread(found)
    return {"step": step, "mean_after_start": mean, "std_after_start": std}


def _spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def _ensemble_row(folder: Path, result: dict[str, Any]) -> Row:
    first = result["members"][0]
    return {
        "folder": str(folder),
        "kind": "ensemble",
        "state": "done",
        "dataset": result.get("dataset"),
        "target": result.get("target_domain"),
        "seed": first.get("seed"),
        "trial": first.get("trial"),
        "source_accuracy": result.get("source_accuracy"),
        "test_accuracy": result.get("test_accuracy"),
        "size_bytes": result["size"]["bytes"],
        "members": len(result["members"]),
    }
