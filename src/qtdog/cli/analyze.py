"""`qtdog analyze`: what can be asked of finished runs, one command per question."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtdog.cli.options import JsonOutput

if TYPE_CHECKING:
    from qtdog.api.analyses import Analysis


N_IMAGES = "Number of images of each domain; of the sources validation images."
Runs = Annotated[list[Path], typer.Argument(help="Run folders, as 'qtdog train' wrote them.", metavar="RUNS...")]
Out = Annotated[
    Path, typer.Option("--output", "-o", help="Folder in which KIND/ is written; the same command goes on there.")
]
Data = Annotated[str | None, typer.Option("--data", help="Data set, if it is not where the runs found it now.")]
NImages = Annotated[int, typer.Option("--num-images", min=1, help=N_IMAGES)]
Seed = Annotated[int, typer.Option(help="Seed of the images and of all random draws.")]
OUT = Path("analyses")


@contextlib.contextmanager
def explained_interrupt() -> Iterator[None]:
    """Turn Ctrl-C, which Python has as KeyboardInterrupt, into a message and the exit code that shells expect.

    Raises:
        Interrupted: with a text that says how to go on.
    """
    from qtdog.core.errors import Interrupted

    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(str(error)) from error


def _show(
    found: Analysis,
    columns: Sequence[str],
    *,
    as_json: bool,
    shown: Callable[[dict[str, Any]], bool] = lambda row: True,
) -> None:
    """Print some columns and rows of the numbers of an analysis, its notes, and where its files are; or all as JSON."""
    from qtdog.cli.console import err, out, print_json, print_table

    result, folder = found.result, found.folder
    if as_json:
        print_json(result)
        return
    rows = [[_cell(row[name]) for name in columns] for row in result["numbers"] if shown(row)]
    print_table([name.replace("_", " ") for name in columns], rows, title=result["title"])
    for note in result["notes"]:
        out.print(note, highlight=False, markup=False, soft_wrap=True)
    files = ", ".join([*result["data"], *result["figures"]])
    err.print(f"{folder}: {files}", highlight=False, markup=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


STAGE = "Which feature map: 0 is the first stage, -1 the last. Earlier ones are finer."


def cam(
    runs: Runs,
    *,
    domain: Annotated[str | None, typer.Option(help="Domain whose images are mapped. Default: the target.")] = None,
    shown: Annotated[int, typer.Option("--num-shown", min=1, help="Number of images that are drawn.")] = 6,
    stage: Annotated[int, typer.Option(help=STAGE)] = -1,
    images: NImages = 32,
    seed: Seed = 0,
    data: Data = None,
    out: Out = OUT,
    as_json: JsonOutput = False,
) -> None:
    """Map where runs find their evidence for the true class, on the same images, and test whether the maps are true.

    Needs grad-cam (extra 'cam'). A faithful map loses the class fast when its hottest pixels go (deletion), and finds
    it fast when they come (insertion); both are compared with a random order.

    Examples:
      qtdog analyze cam runs/float runs/lsq

      qtdog analyze cam runs/float runs/lsq --stage -2 --num-images 64 --num-shown 4
    """
    from qtdog.api.analyses import cam as measure

    options = {"domain": domain, "num_shown": shown, "stage": stage, "num_images": images}
    with explained_interrupt():
        found = measure(runs, **options, seed=seed, data=data, out=out)
    columns = ["run", "n_images", "deletion", "random_deletion", "insertion", "random_insertion"]
    _show(found, columns, as_json=as_json)


DIRECTIONS = "Number of random directions, in opposite pairs; both count."
RADII = "Radii in the units of the weights, separated by commas; '' for none."
FILTER_RADII = "Radii as shares of each filter's length; '' for none."


def flatness(
    runs: Runs,
    *,
    directions: Annotated[int, typer.Option("--num-directions", help=DIRECTIONS)] = 100,
    radii: Annotated[str, typer.Option(help=RADII)] = "0,5,10,15,20,25,30,35,40,45,50,55,60",
    filter_radii: Annotated[str, typer.Option(help=FILTER_RADII)] = "0,0.025,0.05,0.075,0.1",
    images: NImages = 256,
    seed: Seed = 0,
    data: Data = None,
    out: Out = OUT,
    as_json: JsonOutput = False,
) -> None:
    """Measure how much the loss rises at a distance γ from the weights, on sources and target (QT-DoG, Eq. 5).

    One pass over the images for each direction and radius. Smaller is flatter. The rounded weights are what moves.

    Examples:
      qtdog analyze flatness runs/float runs/lsq

      qtdog analyze flatness runs/float runs/lsq --num-directions 20 --num-images 64 --radii 0,20,40 --filter-radii 0.05
    """
    from qtdog.api.analyses import flatness as measure

    absolute, shares = parse_numbers(radii, "--radii"), parse_numbers(filter_radii, "--filter-radii")
    options = {"num_directions": directions, "radii": absolute, "filter_radii": shares, "num_images": images}
    with explained_interrupt():
        found = measure(runs, **options, seed=seed, data=data, out=out)
    columns = ["run", "on", "radius", "gamma", "increase", "standard_error"]
    # all of them are in the table on disk
    some = {"absolute": few(absolute), "filter": few(shares)}
    _show(found, columns, as_json=as_json, shown=lambda row: row["gamma"] in some[row["radius"]])


def few(values: Sequence[float]) -> set[float]:
    """Return at most four values of many, evenly spread, the last among them.

    Example:
        >>> sorted(few([0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60]))
        [15, 30, 45, 60]
    """
    return {values[(len(values) - 1) * k // 4] for k in range(1, 5)} if values else set()


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


PROBES = "Number of random vectors of the spectral density; 0 for none."


ON = "Images of the loss: validation images of the sources, or those of the target."


class Role(StrEnum):
    """On which images the loss is measured."""

    SOURCES = "sources"
    TARGET = "target"


def hessian(
    runs: Runs,
    *,
    on: Annotated[Role, typer.Option(help=ON)] = Role.SOURCES,
    vectors: Annotated[int, typer.Option("--num-vectors", help="Largest number of random vectors of the trace.")] = 500,
    error: Annotated[float, typer.Option(help="Standard error of the trace that is enough, as a share of it.")] = 0.05,
    eigenvalues: Annotated[int, typer.Option("--num-eigenvalues", help="Number of the largest eigenvalues.")] = 3,
    probes: Annotated[int, typer.Option("--num-probes", help=PROBES)] = 4,
    images: NImages = 64,
    seed: Seed = 0,
    data: Data = None,
    out: Out = OUT,
    as_json: JsonOutput = False,
) -> None:
    """Measure the curvature of the loss at the weights that are saved: trace, largest eigenvalues, spectral density.

    Random vectors are added until the trace is known to --error. The density needs curvlinops (extra 'curvature').

    Examples:
      qtdog analyze hessian runs/float runs/lsq

      qtdog analyze hessian runs/float runs/lsq --num-images 32 --num-probes 0
    """
    from qtdog.api.analyses import hessian as measure

    options = {"num_vectors": vectors, "error": error, "num_eigenvalues": eigenvalues, "num_probes": probes}
    with explained_interrupt():
        found = measure(runs, on=on.value, **options, num_images=images, seed=seed, data=data, out=out)
    columns = ["run", "trace", "standard_error", "image_error", "n_vectors", "top_eigenvalue", "residual"]
    _show(found, columns, as_json=as_json)


def noise(runs: Runs, *, out: Out = OUT, as_json: JsonOutput = False) -> None:
    """Compare what rounding does to the weights with uniform noise: divergence, symmetry, clipped share, per layer.

    Needs the checkpoint/ folder of each run, where the weights before rounding are. No image is opened.

    Examples:
      qtdog analyze noise runs/lsq

      qtdog analyze noise runs/lsq runs/lsq-4bit --json
    """
    from qtdog.analysis.quantization_noise import ALL
    from qtdog.api.analyses import noise as measure

    with explained_interrupt():
        found = measure(runs, out=out)
    columns = ["run", "layer", "n", "kl", "floor", "excess", "mean", "std", "clipped_frac", "moved_frac"]
    _show(found, columns, as_json=as_json, shown=lambda row: row["layer"] == ALL)


MISTAKES = "Number of surest mistakes on the target that are drawn."


def errors(
    runs: Runs,
    *,
    images: Annotated[
        int | None, typer.Option("--num-images", min=1, help="Number of images of each domain. Default: all.")
    ] = None,
    mistakes: Annotated[int, typer.Option("--num-mistakes", min=0, help=MISTAKES)] = 24,
    seed: Seed = 0,
    data: Data = None,
    out: Out = OUT,
    as_json: JsonOutput = False,
) -> None:
    """Show where runs err: confusion by domain, worst domain, worst class, gap to the target, surest mistakes.

    Examples:
      qtdog analyze errors runs/float runs/lsq

      qtdog analyze errors runs/lsq --num-images 256 --num-mistakes 12
    """
    from qtdog.api.analyses import errors as measure

    options = {"num_images": images, "num_mistakes": mistakes, "seed": seed}
    with explained_interrupt():
        found = measure(runs, **options, data=data, out=out)
    columns = ["run", "source_accuracy", "target_accuracy", "gap", "worst_domain", "worst_class", "worst_cell"]
    _show(found, columns, as_json=as_json)


def stability(runs: Runs, *, seed: Seed = 0, out: Out = OUT, as_json: JsonOutput = False) -> None:
    """Draw accuracy over the steps of runs, and measure how far selection on the sources can be trusted.

    The rank correlation is between source-validation and target accuracy over the checkpoints that could be saved:
    near 1 the sources select well, near 0 no better than chance. Runs need not be finished.

    Example:
      qtdog analyze stability runs/float runs/lsq runs/lsq-swad
    """
    from qtdog.api.analyses import stability as measure

    found = measure(runs, seed=seed, out=out)
    columns = ["run", "n_checkpoints", "target_std", "largest_drop", "spearman", "spearman_low", "spearman_high"]
    _show(found, [*columns, "selected", "best"], as_json=as_json)


PLANE = "Measure on a plane instead of a line; it takes the square of --num-points passes."
REACH = "Around one run: share of each filter's length. Between two: how far beyond them, as a share of their distance."


def surface(
    runs: Runs,
    *,
    plane: Annotated[bool, typer.Option("--plane", help=PLANE)] = False,
    points: Annotated[int, typer.Option("--num-points", help="Number of measurements on each axis.")] = 21,
    reach: Annotated[float, typer.Option(help=REACH)] = 0.25,
    images: NImages = 128,
    seed: Seed = 0,
    data: Data = None,
    out: Out = OUT,
    as_json: JsonOutput = False,
) -> None:
    """Draw the loss around a run, or along the straight line between two: does it rise between them?

    Examples:
      qtdog analyze surface runs/lsq --plane --num-points 11 -o analyses/around

      qtdog analyze surface runs/float runs/lsq -o analyses/between
    """
    from qtdog.api.analyses import surface as measure

    options = {"plane": plane, "num_points": points, "reach": reach, "num_images": images}
    with explained_interrupt():
        found = measure(runs, **options, seed=seed, data=data, out=out)
    columns = [name for name in ("x", "y", "sources", "target") if name in found.numbers[0]]
    _show(found, columns, as_json=as_json, shown=lambda row: row["y"] == 0)


analyze_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Ask why runs do what they do: flatness, curvature, rounding noise, stability, attention, mistakes.",
    epilog="Every command writes OUT/KIND/: points, a table, figures (PNG, PDF) and analysis.json for the report.",
)
for _command in (flatness, hessian, surface, noise, stability, cam, errors):
    analyze_app.command()(_command)
analyze_app.command("slices", hidden=True)(errors)  # its name before
