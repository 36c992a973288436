"""`qtdog data fetch` and `qtdog data import`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qtdog.data.cards import Datasheet
    from qtdog.data.fetch import Fetched

NAME = typer.Argument(help="A name of 'qtdog data list'.", metavar="NAME")
TO = "Folder for the data set itself. Default: NAME in $QTDOG_DATA, or in ~/.local/share/qtdog."
YES = "Agree to the licence without being asked."


def fetch(
    name: Annotated[str, NAME],
    *,
    to: Annotated[Path | None, typer.Option(help=TO)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help=YES)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was fetched as JSON.")] = False,
) -> None:
    """Download a benchmark, unpack it safely, and lay it out for training.

    The licence is shown first. Interrupted, the same command goes on where it stopped. Hashes that nobody published are
    remembered at the first complete download and must be met from then on. The exit code is 1 if the number of images
    is not that of the datasheet.

    Examples:
      qtdog data fetch pacs

      qtdog data fetch domainnet --to /data/domainnet --yes
    """
    from qtdog.cli.console import err, print_json
    from qtdog.core.errors import Interrupted
    from qtdog.data.cards import CARDS, data_home
    from qtdog.data.download import describe
    from qtdog.data.fetch import fetch as run
    from qtdog.data.import_layouts import require_new

    sheet = CARDS[name]
    target = to or data_home() / name
    if sheet.archives:
        require_new(target)
        _agree(sheet, yes)
    try:
        with _bars() as steps:
            fetched = run(sheet, target, steps=steps)
    except KeyboardInterrupt as error:
        text = f"interrupted: what was downloaded is kept beside {target}; the same command goes on from there"
        raise Interrupted(text) from error
    differences = _check(name, fetched)
    _say(fetched, differences)
    if as_json:
        print_json(
            {"folder": str(target), "files": [describe(file) for file in fetched.files], "differences": differences}
        )
    elif not differences:
        err.print(f"use it: qtdog train --data {target if to else name}", highlight=False, soft_wrap=True)
    if differences:
        raise typer.Exit(1)


def _agree(sheet: Datasheet, yes: bool) -> None:
    from qtdog.cli.console import err
    from qtdog.core.errors import ConfigError

    for key, value in (("", sheet.title), ("source", sheet.source), ("licence", sheet.licence), ("paper", sheet.paper)):
        err.print(f"{key + ': ' if key else ''}{value}", markup=False, highlight=False, soft_wrap=True)
    if sheet.note:
        err.print(f"note: {sheet.note}", markup=False, highlight=False, soft_wrap=True)
    try:
        agreed = yes or typer.confirm("Do you agree to these terms?", err=True)
    except typer.Abort as error:
        raise ConfigError("the terms were not agreed to; --yes agrees without asking") from error
    if not agreed:
        raise ConfigError("the terms were not agreed to; nothing was downloaded")


def _check(name: str, fetched: Fetched) -> list[str]:
    """Compare the folder with its card; its hashes are remembered only if it is what the card promises."""
    from qtdog.data.cards import check_counts
    from qtdog.data.fetch import remember
    from qtdog.data.open import is_text, open_dataset, open_texts

    folder = str(fetched.folder)
    dataset = open_texts(folder) if is_text(folder) else open_dataset(folder, min_domains=1)
    differences = check_counts(dataset)
    if not differences:
        remember(name, fetched)
    return differences


def _say(fetched: Fetched, differences: list[str]) -> None:
    from qtdog.cli.console import err, warn

    err.print(f"laid out as: {fetched.layout}", markup=False, highlight=False, soft_wrap=True)
    total = sum(file.n_bytes for file in fetched.files)
    saved = f", of which {fetched.n_saved / 1e6:,.3f} MB were there already" if fetched.n_saved else ""
    err.print(f"{fetched.folder}: {total / 1e6:,.3f} MB{saved}", highlight=False, soft_wrap=True)
    for difference in differences:
        warn(difference)
    if fetched.first_time and not differences:
        names = ", ".join(fetched.first_time)
        text = f"nobody published a hash of {names}: this first download is trusted, and later ones must equal it"
        err.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _bars() -> Iterator:
    from qtdog.cli.data_progress import ByteBar
    from qtdog.cli.progress import CountingBar
    from qtdog.data.fetch import Steps

    with ByteBar() as bar:
        yield Steps(bar, CountingBar("unpacking"), CountingBar("laying out and hashing"))


def import_folder(
    folder: Annotated[Path, typer.Argument(help="The copy that you have.", metavar="DIR")],
    *,
    name: Annotated[str, typer.Option("--as", help="Which data set it is: a name of 'qtdog data list'.")],
    to: Annotated[Path | None, typer.Option(help=TO)] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the files; default: links, which take no space.")] = False,
) -> None:
    """Adopt a copy of a benchmark that you have, however it is laid out: DomainBed's way, Dassl's, or TLlib's lists.

    Nothing in DIR is changed. The exit code is 1 if the number of images is not that of the datasheet.

    Examples:
      qtdog data import old/PACS/kfold --as pacs

      qtdog data import dassl/office_home_dg --as office-home --copy
    """
    import datetime

    from qtdog.cli.console import err, warn
    from qtdog.cli.progress import CountingBar
    from qtdog.data.cards import CARDS, check_counts, data_home
    from qtdog.data.image_folder import require_path
    from qtdog.data.import_layouts import adopt
    from qtdog.data.open import is_text, open_dataset, open_texts

    sheet = CARDS[name]
    require_path(folder, "the folder")
    target = to or data_home() / name
    origin = {"dataset": name, "date": datetime.date.today().isoformat(), "imported_from": folder.resolve().name}
    bar = CountingBar("laying out and hashing")
    layout = adopt(folder, target, sheet, "copy" if copy else "link", origin, progress=bar)
    source = str(target)
    dataset = open_texts(source) if is_text(source) else open_dataset(source, min_domains=1)
    differences = check_counts(dataset)
    what = "texts" if is_text(source) else "images"
    err.print(f"{target}: {len(dataset):,} {what}, laid out before as {layout}", markup=False, highlight=False)
    for difference in differences:
        warn(difference)
    if differences:
        raise typer.Exit(1)
