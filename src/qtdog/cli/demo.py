"""`qtdog demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

TARGETS = ("0", "75")
METHODS = {"float": {"quantizer": "none"}, "7-bit": {"quantizer": "lsq", "bits": 7}}


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Where to write runs and report.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=10, help="Updates per run.")] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Compare float ERM with 7-bit QT-DoG on digits rotated by angles that neither saw in training.

    Two unseen angles (0° and 75°), two methods, one seed: a look at the program, not a measurement of the method. What
    is finished in the output folder is not trained again.

    Example:
      qtdog demo
    """
    from qtdog.cli.console import err, print_json, print_table
    from qtdog.cli.plan import Request, make_plan
    from qtdog.cli.train import run_all
    from qtdog.report.table import target_table

    results: list[dict[str, Any]] = []
    for target in TARGETS:
        for method, flags in METHODS.items():
            folder = out / f"{method}-{target}"
            request = Request({"target": target, "steps": steps, **flags}, out=folder, resume=True)
            results += run_all(*make_plan(request), resume=True)
    headers, rows = target_table(by_method(results))
    report = write_report(out, results)
    if as_json:
        print_json(results)
    else:
        print_table(headers, rows, title="accuracy (%) on digits at an unseen angle (degrees); one seed")
    err.print(f"report  {report.resolve()}", highlight=False, soft_wrap=True, markup=False)


def by_method(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the results grouped by method, in the order of their first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    return groups


def write_report(out: Path, results: Sequence[dict[str, Any]]) -> Path:
    """Write `report.md` and `accuracy.png` from finished runs, and return the report's path."""
    from qtdog.core.files import write_atomic
    from qtdog.report.plot import Curve, plot_curves
    from qtdog.report.table import markdown, target_table
    from qtdog.training.run_folder import RunFolder

    curves = []
    for result in results:
        folder = RunFolder(Path(result["folder"]))
        config = folder.read_config()
        assert config is not None
        curves.append(Curve(result["method"], config.data.target, folder.read_metrics(), config.start_step))
    plot_curves(curves, out / "accuracy.png")
    where = results[0]["environment"]
    text = [
        "# Rotated digits: float ERM and 7-bit QT-DoG",
        "Accuracy (%) on all digits at an angle that was never trained on. One seed, so differences of a point or two "
        "are chance. Checkpoints are chosen by source validation; file sizes are read from disk.",
        markdown(*target_table(by_method(results))),
        "![accuracy over steps](accuracy.png)",
        f"Made by `qtdog demo` on {where['date']}: {where['cpu']}, {where['n_cores']} cores, torch {where['torch']}.",
    ]
    write_atomic(out / "report.md", "\n\n".join(text) + "\n")
    return out / "report.md"
