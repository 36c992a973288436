"""Results as rows, and rows as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NO_TARGET = "no unseen domain"


def percent(value: float | None) -> str:
    """Return an accuracy in percent with one decimal, or a dash.

    Example:
        >>> percent(0.876), percent(None)
        ('87.6', '–')
    """
    return "–" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"  # + 0.0: no minus before a zero


def size_text(size: Mapping[str, float]) -> str:
    """Return bytes and ratio to float32 for people.

    Example:
        >>> size_text({"bytes": 3_345_000, "ratio": 4.06})
        '3.35 MB (4.06x smaller)'
    """
    text = f"{size['bytes'] / 1e6:.3g} MB"
    return f"{text} ({size['ratio']:.2f}x smaller)" if size["ratio"] > 1.005 else text


def method_name(config: Mapping[str, Any]) -> str:
    """Return a short name of what a configuration trains: every axis that is not at its plainest, and the grid.

    Example:
        >>> method_name({"objective": {"name": "erm"}, "quantizer": {"name": "lsq", "bits": 7}})
        'erm + lsq 7 bit'
        >>> method_name({"objective": {"name": "coral"}, "averager": {"name": "swad"}, "quantizer": {"name": "none"}})
        'coral + swad + float'
    """
    names = [config["objective"]["name"]]
    names += ["teacher"] if config["objective"].get("teacher") else []
    chosen = [config.get("model", {}).get("feature_layer", "none")]
    chosen += [config.get(axis, {}).get("name", "none") for axis in ("step_rule", "averager")]
    return " + ".join([*names, *(name for name in chosen if name not in ("none", "plain")), _grid(config["quantizer"])])


def _grid(quantizer: Mapping[str, Any]) -> str:
    if quantizer["name"] == "none":
        return "float"
    mixed = " (mixed)" if quantizer.get("layer_bits") else ""
    return f"{quantizer['name']} {quantizer['bits']} bit{mixed}"


def target_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows: a row per method, a column per unseen domain, then averages and size.

    Args:
        results: for each method its results (`result.json`), one or more per target; several for one target (members)
            are averaged.
    """
    targets = sorted({unseen(result) for runs in results.values() for result in runs})
    headers = ["method", *targets, "average", "source", "file"]
    rows = []
    for method, runs in results.items():
        per_target = [_mean(run["test_accuracy"] for run in runs if unseen(run) == t) for t in targets]
        source = _mean(run["source_accuracy"] for run in runs)
        rows.append(
            [method, *map(percent, per_target), percent(_mean(per_target)), percent(source), size_text(runs[0]["size"])]
        )
    return headers, rows


def unseen(result: Mapping[str, Any]) -> str:
    """Return what a result was tested on: its unseen domain, or words for what stands in its place.

    Example:
        >>> unseen({"test_mode": "target", "target_domain": "sketch"})
        'sketch'
    """
    in_domain = result["test_mode"] == "in-domain"
    return "last 20 % of sources" if in_domain else str(result["target_domain"] or NO_TARGET)


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Return a Markdown table; a cell cannot break out of it.

    Example:
        >>> print(markdown(["a"], [["x|y"]]))
        | a |
        | --- |
        | x\|y |
    """
    lines = [headers, ["---"] * len(headers), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
