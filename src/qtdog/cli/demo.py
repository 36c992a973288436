"""`qtdog demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qtdog.cli.options import JsonOutput

TARGETS = ("0", "75")
MEMBERS = 3


def demo(
    *,
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder to write: runs and report.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=10, help="Number of updates of each run.")] = 400,
    as_json: JsonOutput = False,
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
    page = write_page(out)
    if as_json:
        print_json(results)
    else:
        print_table(headers, rows, title="accuracy (%) on digits at an unseen angle (degrees); one seed")
    err.print(f"report  {page.resolve()}", highlight=False, soft_wrap=True, markup=False)


def run_target(out: Path, target: str, steps: int) -> list[dict[str, Any]]:
    """Return the results of a float run, a 7-bit run and the ensemble of this and two more, for one unseen angle."""
    from dataclasses import replace

    from qtdog.api.experiment import Members, Request, make_plan
    from qtdog.cli.train import join_shown, train_shown

    flags = {"target": target, "steps": steps}
    quantized = Request(
        flags | {"quantizer": "lsq", "bits": 7}, members=Members(MEMBERS, fork_at="start"), out=out, resume=True
    )
    dataset, members = make_plan(quantized)
    _, (single,) = make_plan(Request(flags | {"quantizer": "none"}, out=out / f"{target}-float", resume=True))
    fork_point = members[0].fork_point
    assert fork_point is not None
    # the float run goes on where the quantized ones begin: its steps until then are theirs
    single = replace(single, fork_point=replace(fork_point, until=fork_point.step))
    first, *_ = train_shown(dataset, members[:1], resume=True)
    results = [*train_shown(dataset, [single], resume=True), first]
    train_shown(dataset, members[1:], resume=True)
    return results + join_shown(dataset, members, out)


def by_method(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the results grouped by method, in the order of their first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    return groups


def write_page(out: Path) -> Path:
    """Write `report.html` from everything finished in a folder, and return its path."""
    from qtdog.core.files import write_atomic
    from qtdog.report.html import PageOptions, build_page
    from qtdog.runs.find import find_runs

    page = out / "report.html"
    write_atomic(page, build_page(find_runs([out]), PageOptions(page, title="Rotated digits")))
    return page
