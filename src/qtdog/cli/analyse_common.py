"""What the commands of `qtdog analyse` share: their options, the runs, stopping, and what they show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qtdog.analysis.subject import Subject

Runs = Annotated[list[Path], typer.Argument(help="Run folders, as 'qtdog train' wrote them.", metavar="RUNS...")]
Out = Annotated[Path, typer.Option(help="Where KIND/ is written; the same command goes on there.")]
Data = Annotated[str | None, typer.Option(help="Where the data set lies now, if not where the runs found it.")]
NImages = Annotated[int, typer.Option("--images", min=1, help="Images of each domain: held-out ones of the sources.")]
Seed = Annotated[int, typer.Option(help="Of the images and all random draws.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print analysis.json.")]
OUT = Path("analyses")


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Return a name for each run: its method and settings, and what else tells it from the others.

    Raises:
        ConfigError: a run is named twice.
        RunError: no folder of a run.
    """
    from collections import Counter

    from qtdog.analysis.subject import read_run
    from qtdog.core.errors import ConfigError
    from qtdog.report.tables import method_name, setting_labels
    from qtdog.runs.entry import settings_of

    twice = [path for path, n in Counter(path.resolve() for path in paths).items() if n > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is named twice")
    configs = [read_run(path)[1] for path in paths]
    trees = [config.model_dump(mode="json") for config in configs]
    names = setting_labels([method_name(tree) for tree in trees], [settings_of(tree) for tree in trees])
    for told in (
        [f", {config.data.target} unseen" for config in configs],
        [f", trial {config.data.trial}" for config in configs],
        [f", seed {config.train.seed}" for config in configs],
        [f" ({path.name or path})" for path in paths],
    ):
        names = _told_apart(names, told)
    return names


def _told_apart(names: Sequence[str], told: Sequence[str]) -> list[str]:
    """Return names with what is told of each added, among those of one name where it differs."""
    said: dict[str, set[str]] = {}
    for name, text in zip(names, told, strict=True):
        said.setdefault(name, set()).add(text)
    return [name + text if len(said[name]) > 1 else name for name, text in zip(names, told, strict=True)]


def subjects_of(paths: Sequence[Path], data: str | None) -> list[Subject]:
    """Return the runs, their models on the device of this machine.

    Raises:
        RunError, DataError, FormatError, ModelError: as in `analysis.subject.open_subjects`.
    """
    from accelerate import Accelerator

    from qtdog.analysis.subject import open_subjects
    from qtdog.cli.progress import CountingBar

    device = Accelerator().device
    return open_subjects(paths, labels_of(paths), data=data, device=device, progress=CountingBar("reading images"))


@contextlib.contextmanager
def stoppable(folder: Path) -> Iterator[Callable[[], None]]:
    """Yield a function that raises Interrupted once Ctrl-C was pressed; what is measured by then is kept.

    Raises:
        Interrupted: with a text that says how to go on.
    """
    from qtdog.core.errors import Interrupted
    from qtdog.training.signals import StopRequest

    try:
        with StopRequest() as stop:
            yield stop.check
    except Interrupted as error:
        again = Interrupted(f"stopped; what is measured is kept in {folder}, and the same command goes on from there")
        again.exit_code = error.exit_code
        raise again from error


def show(
    said: dict[str, Any],
    folder: Path,
    columns: Sequence[str],
    *,
    as_json: bool,
    shown: Callable[[dict[str, Any]], bool] = lambda row: True,
) -> None:
    """Print some columns and rows of the numbers of an analysis, its notes, and where its files are; or all as JSON."""
    from qtdog.cli.console import err, out, print_json, print_table

    if as_json:
        print_json(said)
        return
    rows = [[_cell(row[name]) for name in columns] for row in said["numbers"] if shown(row)]
    print_table([name.replace("_", " ") for name in columns], rows, title=said["title"])
    for note in said["notes"]:
        out.print(note, highlight=False, markup=False, soft_wrap=True)
    files = ", ".join([*said["data"], *said["figures"]])
    err.print(f"{folder}: {files}", highlight=False, markup=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
