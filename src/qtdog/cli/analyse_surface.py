"""`qtdog analyse surface`."""

from __future__ import annotations

from typing import Annotated

import typer

from qtdog.cli.analyse_common import OUT, AsJson, Data, NImages, Out, Runs, Seed, show, stoppable, subjects_of

REACH = "Around one run: share of each filter's length. Between two: how far beyond them, as a share of their distance."


def surface(
    runs: Runs,
    *,
    plane: Annotated[bool, typer.Option("--plane", help="A plane instead of a line: POINTS × POINTS passes.")] = False,
    points: Annotated[int, typer.Option(help="Points on each axis.")] = 21,
    reach: Annotated[float, typer.Option(help=REACH)] = 0.25,
    images: NImages = 128,
    seed: Seed = 0,
    data: Data = None,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Draw the loss around a run, or along the straight line between two: is there a wall between them?

    Examples:
      qtdog analyse surface runs/lsq --plane --points 11 --out analyses/around

      qtdog analyse surface runs/float runs/lsq --out analyses/between
    """
    from qtdog.analysis.loss_surface import SurfacePlan, measure_surface
    from qtdog.cli.progress import CountingBar

    plan = SurfacePlan(2 if plane else 1, points, reach, images, seed)
    folder = out / "surface"
    with stoppable(folder) as check:
        bar = CountingBar("points of the surface")
        said = measure_surface(subjects_of(runs, data), plan, folder, progress=bar, check=check)
    columns = [name for name in ("x", "y", "sources", "target") if name in said["numbers"][0]]
    show(said, folder, columns, as_json=as_json, shown=lambda row: row["y"] == 0)
