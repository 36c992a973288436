"""`qtdog analyse flatness`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from qtdog.cli.analyse_common import OUT, AsJson, Data, NImages, Out, Runs, Seed, show, stoppable, subjects_of

RADII = "Radii in the units of the weights, separated by commas; '' for none."
FILTER_RADII = "Radii as shares of each filter's length; '' for none."


def flatness(
    runs: Runs,
    *,
    directions: Annotated[int, typer.Option(help="Random directions, in opposite pairs; both count.")] = 100,
    radii: Annotated[str, typer.Option(help=RADII)] = "0,5,10,15,20,25,30,35,40,45,50,55,60",
    filter_radii: Annotated[str, typer.Option(help=FILTER_RADII)] = "0,0.025,0.05,0.075,0.1",
    images: NImages = 256,
    seed: Seed = 0,
    data: Data = None,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Measure how much the loss rises at a distance γ from the weights, on sources and target (QT-DoG, Eq. 5).

    One pass over the images for each direction and radius. Smaller is flatter. The rounded weights are what moves.

    Examples:
      qtdog analyse flatness runs/float runs/lsq

      qtdog analyse flatness runs/float runs/lsq --directions 20 --images 64 --radii 0,20,40 --filter-radii 0.05
    """
    from qtdog.analysis.flatness import FlatnessPlan, measure_flatness
    from qtdog.cli.progress import CountingBar

    asked = {"absolute": parse_numbers(radii, "--radii"), "filter": parse_numbers(filter_radii, "--filter-radii")}
    gammas = {kind: values for kind, values in asked.items() if values}
    plan = FlatnessPlan(gammas, directions, images, seed)
    folder = out / "flatness"
    with stoppable(folder) as check:
        bar = CountingBar("passes over the images")
        said = measure_flatness(subjects_of(runs, data), plan, folder, progress=bar, check=check)
    columns = ["run", "on", "radius", "gamma", "increase", "standard_error"]
    some = {kind: few(values) for kind, values in gammas.items()}  # all of them are in the table on disk
    show(said, folder, columns, as_json=as_json, shown=lambda row: row["gamma"] in some[row["radius"]])


def few(values: Sequence[float]) -> set[float]:
    """Return at most four values of many, evenly spread, the last among them.

    Example:
        >>> sorted(few([0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60]))
        [15, 30, 45, 60]
    """
    return {values[(len(values) - 1) * k // 4] for k in range(1, 5)}


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Return numbers from a list like `0,5,10`, ascending, each once; none of an empty text.

    Raises:
        ConfigError: no such list.

    Example:
        >>> parse_numbers("0, 10,5", "--radii")
        (0.0, 5.0, 10.0)
    """
    from qtdog.core.errors import ConfigError

    try:
        return tuple(sorted({float(part) for part in text.split(",")})) if text else ()
    except ValueError as error:
        raise ConfigError(f"{option} takes numbers like 0,5,10; got '{text}'") from error
