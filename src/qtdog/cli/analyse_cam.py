"""`qtdog analyse cam`."""

from __future__ import annotations

from typing import Annotated

import typer

from qtdog.cli.analyse_common import OUT, AsJson, Data, NImages, Out, Runs, Seed, show, stoppable, subjects_of

STAGE = "Which feature map: 0 is the first stage, -1 the last. Earlier ones are finer."


def cam(
    runs: Runs,
    *,
    domain: Annotated[str | None, typer.Option(help="Whose images. Default: the target.")] = None,
    shown: Annotated[int, typer.Option(min=1, help="Images that are drawn.")] = 6,
    stage: Annotated[int, typer.Option(help=STAGE)] = -1,
    images: NImages = 32,
    seed: Seed = 0,
    data: Data = None,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Map where runs find their evidence for the true class, on the same images, and test whether the maps are true.

    Needs grad-cam (extra 'cam'). A faithful map loses the class fast when its hottest pixels go (deletion), and finds
    it fast when they come (insertion); both are compared with a random order.

    Examples:
      qtdog analyse cam runs/float runs/lsq

      qtdog analyse cam runs/float runs/lsq --stage -2 --images 64 --shown 4
    """
    from qtdog.analysis.gradcam import CamPlan, measure_cam
    from qtdog.cli.progress import CountingBar

    plan = CamPlan(domain, images, shown, stage, seed)
    folder = out / "cam"
    with stoppable(folder) as check:
        said = measure_cam(subjects_of(runs, data), plan, folder, progress=CountingBar("maps"), check=check)
    columns = ["run", "n_images", "deletion", "random_deletion", "insertion", "random_insertion"]
    show(said, folder, columns, as_json=as_json)
