"""`qtdog analyse hessian`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from qtdog.cli.analyse_common import OUT, AsJson, Data, NImages, Out, Runs, Seed, show, stoppable, subjects_of


class Role(StrEnum):
    """On which images the loss is measured."""

    SOURCES = "sources"
    TARGET = "target"


def hessian(
    runs: Runs,
    *,
    on: Annotated[Role, typer.Option(help="Held-out images of the sources, or the target.")] = Role.SOURCES,
    vectors: Annotated[int, typer.Option(help="Random vectors of the trace, at most.")] = 500,
    error: Annotated[float, typer.Option(help="Standard error of the trace that is enough, as a share of it.")] = 0.05,
    eigenvalues: Annotated[int, typer.Option(help="How many of the largest.")] = 3,
    probes: Annotated[int, typer.Option(help="Random vectors of the spectral density; 0 for none.")] = 4,
    images: NImages = 64,
    seed: Seed = 0,
    data: Data = None,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Measure the curvature of the loss at the weights that ship: trace, largest eigenvalues, spectral density.

    Random vectors are added until the trace is known to --error. The density needs curvlinops (extra 'curvature').

    Examples:
      qtdog analyse hessian runs/float runs/lsq

      qtdog analyse hessian runs/float runs/lsq --images 32 --probes 0
    """
    from qtdog.analysis.hessian import HessianPlan, measure_hessian
    from qtdog.cli.progress import CountingBar

    plan = HessianPlan(
        on=on.value,
        n_images=images,
        max_vectors=vectors,
        error_frac=error,
        n_eigenvalues=eigenvalues,
        n_probes=probes,
        seed=seed,
    )
    folder = out / "hessian"
    with stoppable(folder) as check:
        bar = CountingBar("vectors, eigenvalues and probes")
        said = measure_hessian(subjects_of(runs, data), plan, folder, progress=bar, check=check)
    columns = ["run", "trace", "standard_error", "image_error", "n_vectors", "top_eigenvalue", "residual"]
    show(said, folder, columns, as_json=as_json)
