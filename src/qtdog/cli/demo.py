"""`qtdog demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

TARGETS = ("0", "75")
MEMBERS = 3


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Where to write runs and report.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=10, help="Updates per run.")] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Compare float ERM, 7-bit QT-DoG and an ensemble of three on digits rotated by angles that none saw in training.

    Two unseen angles (0° and 75°), one seed: a look at the program, not a measurement of the method. All models of an
    angle share their float steps. What is finished in the output folder is not trained again.

    Example:
      qtdog demo
    """
    from qtdog.cli.console import err, print_json, print_table
    from qtdog.report.tables import cost_table

    results = [result for target in TARGETS for result in run_target(out, target, steps)]
    headers, rows = cost_table(by_method(results))
    pages = [write_page(out), write_report(out, results)]
    if as_json:
        print_json(results)
    else:
        print_table(headers, rows, title="accuracy (%) on digits at an unseen angle (degrees); one seed")
    for page in pages:
        err.print(f"report  {page.resolve()}", highlight=False, soft_wrap=True, markup=False)


def run_target(out: Path, target: str, steps: int) -> list[dict[str, Any]]:
    """Return the results of a float run, a 7-bit run and the ensemble of this and two more, for one unseen angle."""
    from dataclasses import replace

    from qtdog.api.experiment import Crew, Request, make_plan
    from qtdog.cli.train import join_all, run_all

    flags = {"target": target, "steps": steps}
    crew = Crew(MEMBERS, fork_at="start")
    dataset, members = make_plan(Request(flags | {"quantizer": "lsq", "bits": 7}, crew=crew, out=out, resume=True))
    _, (single,) = make_plan(Request(flags | {"quantizer": "none"}, out=out / f"{target}-float", resume=True))
    fork_point = members[0].fork_point
    assert fork_point is not None
    # the float run goes on where the quantized ones begin: its steps until then are theirs
    single = replace(single, fork_point=replace(fork_point, until=fork_point.step))
    first, *_ = run_all(dataset, members[:1], resume=True)
    results = [*run_all(dataset, [single], resume=True), first]
    run_all(dataset, members[1:], resume=True)
    return results + join_all(dataset, members, out)


def by_method(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the results grouped by method, in the order of their first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    return groups


def write_report(out: Path, results: Sequence[dict[str, Any]]) -> Path:
    """Write `report.md` and `accuracy.png` from finished runs and ensembles, and return the report's path."""
    from qtdog.core.files import write_atomic
    from qtdog.report.plots import Curve, plot_curves
    from qtdog.report.tables import cost_table, markdown
    from qtdog.runs.folder import RunFolder

    curves = []
    for result in results:
        if "members" in result:  # an ensemble has no steps of its own
            continue
        folder = RunFolder(Path(result["folder"]))
        config = folder.read_config()
        assert config is not None
        curves.append(Curve(result["method"], config.data.target, folder.read_metrics(), config.start_step))
    plot_curves(curves, out / "accuracy.png")
    where = results[0]["environment"]
    text = [
        "# Rotated digits: float ERM, 7-bit QT-DoG and an ensemble of three",
        "Accuracy (%) on all digits at an angle that was never trained on. One seed, so differences of a point or two "
        "are chance. Checkpoints are chosen by source validation; file sizes are read from disk. EoQ is the ensemble "
        "of the 7-bit model and two more that share its float steps.",
        markdown(*cost_table(by_method(results))),
        "![accuracy over steps](accuracy.png)",
        f"Made by `qtdog demo` on {where['date']}: {where['cpu']}, {where['n_cores']} cores, torch {where['torch']}.",
    ]
    write_atomic(out / "report.md", "\n\n".join(text) + "\n")
    return out / "report.md"


def write_page(out: Path) -> Path:
    """Write `report.html` from everything finished in a folder, and return its path."""
    from qtdog.core.files import write_atomic
    from qtdog.report.html import PageOptions, build_page
    from qtdog.runs.find import find

    page = out / "report.html"
    write_atomic(page, build_page(find([out]), PageOptions(page, title="Rotated digits")))
    return page
