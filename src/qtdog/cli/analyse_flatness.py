"""`qtdog analyse flatness`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

from qtdog.cli.analyse_common import OUT, AsJson, Data, NImages, Out, Runs, Seed, show, stoppable, subjects_of


class Kind(StrEnum):
    """In what a radius is measured."""

    ABSOLUTE = "absolute"
    FILTER = "filter"
    BOTH = "both"


RADII = "Radii, separated by commas, for one --radius. Default: 0,5,…,60, and 0,0.0125,…,0.15 of each filter."


def flatness(
    runs: Runs,
    *,
    directions: Annotated[int, typer.Option(help="Random directions, in opposite pairs; both count.")] = 100,
    radius: Annotated[Kind, typer.Option(help="Units of the weights, share of each filter's length, or both.")] = (
        Kind.BOTH
    ),
    radii: Annotated[str | None, typer.Option(help=RADII)] = None,
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

      qtdog analyse flatness runs/float runs/lsq --directions 20 --images 64 --radius absolute --radii 0,10,20
    """
    from qtdog.analysis.flatness_study import RADII, FlatnessPlan, measure_flatness
    from qtdog.cli.progress import CountingBar
    from qtdog.core.errors import ConfigError

    kinds = ("absolute", "filter") if radius is Kind.BOTH else (radius.value,)
    if radii is not None and len(kinds) > 1:
        raise ConfigError("--radii are of one kind: add --radius absolute or --radius filter")
    gammas = {kind: RADII[kind] if radii is None else parse_numbers(radii, "--radii") for kind in kinds}
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
    """Return numbers from a list like `0,5,10`, ascending, each once.

    Raises:
        ConfigError: no such list.

    Example:
        >>> parse_numbers("0, 10,5", "--radii")
        (0.0, 5.0, 10.0)
    """
    from qtdog.core.errors import ConfigError

    try:
        return tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError as error:
        raise ConfigError(f"{option} takes numbers like 0,5,10; got '{text}'") from error
