"""`qtdog analyse slices`."""

from __future__ import annotations

from typing import Annotated

import typer

from qtdog.cli.analyse_common import OUT, AsJson, Data, Out, Runs, Seed, show, stoppable, subjects_of


def slices(
    runs: Runs,
    *,
    images: Annotated[int | None, typer.Option(min=1, help="Images of each domain. Default: all.")] = None,
    mistakes: Annotated[int, typer.Option(min=0, help="Surest mistakes on the target that are drawn.")] = 24,
    seed: Seed = 0,
    data: Data = None,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Show where runs err: confusion by domain, worst domain, worst class, gap to the target, surest mistakes.

    Examples:
      qtdog analyse slices runs/float runs/lsq

      qtdog analyse slices runs/lsq --images 256 --mistakes 12
    """
    from qtdog.analysis.errors_by_domain import measure_slices
    from qtdog.cli.progress import CountingBar

    folder = out / "slices"
    with stoppable(folder) as check:
        bar = CountingBar("domains")
        options = {"n_images": images, "n_mistakes": mistakes, "seed": seed}
        said = measure_slices(subjects_of(runs, data), folder, **options, progress=bar, check=check)
    columns = ["run", "source_accuracy", "target_accuracy", "gap", "worst_domain", "worst_class", "worst_cell"]
    show(said, folder, columns, as_json=as_json)
