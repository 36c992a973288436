"""`qtdog data list | card | verify | fetch | import`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtdog.cli.options import JsonOutput

if TYPE_CHECKING:
    from qtdog.data.cards import DatasetCard
    from qtdog.data.fetch import Fetched
    from qtdog.data.verify import Report, TextReport


NAME = typer.Argument(help="Name of the data set (see 'qtdog data list').", metavar="NAME")
TO = "Folder for the data set itself. Default: NAME in $QTDOG_DATA, or in ~/.local/share/qtdog."
YES = "Agree to the licence without being asked."


def fetch(
    name: Annotated[str, NAME],
    *,
    to: Annotated[Path | None, typer.Option("--output", "-o", help=TO)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help=YES)] = False,
    as_json: JsonOutput = False,
) -> None:
    """Download a benchmark, unpack it safely, and lay it out for training.

    The licence is shown first. Interrupted, the same command goes on where it stopped. Hashes that nobody published are
    remembered at the first complete download and must be met from then on. The exit code is 1 if the number of images
    is not that of the card.

    Examples:
      qtdog data fetch pacs

      qtdog data fetch domainnet -o /data/domainnet --yes
    """
    from qtdog.cli.console import err, print_json
    from qtdog.core.errors import Interrupted
    from qtdog.data.cards import CARDS, data_root
    from qtdog.data.download import download_record
    from qtdog.data.fetch import fetch as run
    from qtdog.data.fetch import work_folder
    from qtdog.data.import_layouts import require_new

    card = CARDS[name]
    target = to or data_root() / name
    if card.archives:
        if not work_folder(target).is_dir():  # else a fetch that was stopped goes on, wherever it was
            require_new(target)
        _agree(card, yes)
    differences: list[str] = []
    try:
        with _bars() as steps:
            fetched = run(card, target, steps=steps, settle=lambda found: differences.extend(_check(name, found)))
    except KeyboardInterrupt as error:
        text = f"interrupted: what was downloaded is kept beside {target}; the same command goes on from there"
        raise Interrupted(text) from error
    _say(fetched, differences)
    if as_json:
        print_json(
            {
                "folder": str(target),
                "files": [download_record(file) for file in fetched.files],
                "differences": differences,
            }
        )
    elif not differences:
        err.print(f"use it: qtdog train --data {target if to else name}", highlight=False, soft_wrap=True)
    if differences:
        raise typer.Exit(1)


def _agree(card: DatasetCard, yes: bool) -> None:
    from qtdog.cli.console import err
    from qtdog.core.errors import ConfigError

    for key, value in (("", card.title), ("source", card.source), ("licence", card.licence), ("paper", card.paper)):
        err.print(f"{key + ': ' if key else ''}{value}", markup=False, highlight=False, soft_wrap=True)
    if card.note:
        err.print(f"note: {card.note}", markup=False, highlight=False, soft_wrap=True)
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
    from qtdog.cli.console import ByteBar, CountingBar
    from qtdog.data.fetch import Steps

    with ByteBar() as bar:
        yield Steps(bar, CountingBar("unpacking"), CountingBar("laying out and hashing"))


def import_folder(
    folder: Annotated[Path, typer.Argument(help="Folder of the copy that you have.", metavar="DIR")],
    *,
    name: Annotated[
        str, typer.Option("--as", help="Which data set it is: a name of 'qtdog data list'. Default: one of your own.")
    ] = "",
    to: Annotated[Path | None, typer.Option("--output", "-o", help=TO)] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the files; default: links, which take no space.")] = False,
) -> None:
    """Import a copy of a benchmark that you have, laid out as for DomainBed, Dassl, or as lists of TLlib.

    Without --as, a folder of your own that is laid out as DOMAIN/SPLIT/CLASS/image (Dassl) becomes DOMAIN/CLASS/image;
    -o is then needed. Nothing in DIR is changed. The exit code is 1 if the number of images is not that of the card.

    Examples:
      qtdog data import old/PACS/kfold --as pacs

      qtdog data import dassl/office_home_dg --as office-home --copy

      qtdog data import mine/ -o mine-for-qtdog
    """
    import datetime

    from qtdog.cli.console import CountingBar, err, warn
    from qtdog.core.errors import ConfigError
    from qtdog.data.cards import CARDS, DatasetCard, check_counts, data_root
    from qtdog.data.image_folder import require_path
    from qtdog.data.import_layouts import adopt
    from qtdog.data.open import is_text, open_dataset, open_texts
    from qtdog.data.scan import PassedOver

    require_path(folder, "the folder")
    if not name and to is None:
        raise ConfigError("give the folder of the new data set (-o FOLDER), or the benchmark that it is (--as NAME)")
    target = to or data_root() / name
    card = CARDS[name] if name else DatasetCard(target.name, f"Images in the folder {target.name}")
    origin = {"dataset": name, "date": datetime.date.today().isoformat(), "imported_from": folder.resolve().name}
    bar = CountingBar("laying out and hashing")
    passed = PassedOver()
    layout = adopt(folder, target, card, "copy" if copy else "link", origin, progress=bar, passed=passed)
    source = str(target)
    dataset = open_texts(source) if is_text(source) else open_dataset(source, min_domains=1)
    differences = check_counts(dataset)
    what = "texts" if is_text(source) else "images"
    err.print(
        f"{target}: {len(dataset):,} {what}, laid out before as {layout}", markup=False, highlight=False, soft_wrap=True
    )
    if passed.summary():
        err.print(passed.summary(), markup=False, highlight=False, soft_wrap=True)
    for warning in [*passed.problems(), *differences]:
        warn(warning)
    if differences:
        raise typer.Exit(1)


data_app = typer.Typer(
    no_args_is_help=True, help="Get data sets and look at them: what is known, what is in a folder, what is broken."
)
data_app.command()(fetch)
data_app.command(name="import")(import_folder)
DATA = typer.Argument(
    help="Data set name, folder ROOT/DOMAIN/CLASS/image, or .csv/.jsonl list[:COLUMN].", metavar="DATA"
)


@data_app.command(name="list")
def list_cards(*, as_json: JsonOutput = False) -> None:
    """List the data sets that are known by name, and whether they are here. Any folder DOMAIN/CLASS/image works too.

    Example:
      qtdog data list
    """
    from qtdog.cli.console import print_json, print_table
    from qtdog.data.cards import CARDS

    if as_json:
        others = [{"name": name, "title": about, "here": origin} for name, about, origin in _plugin_datasets()]
        print_json([*(asdict(CARDS[name]) | {"here": _here(name)} for name in CARDS), *others])
        return
    rows = [[name, CARDS[name].title, _count(CARDS[name]), _here(name) or "–"] for name in CARDS]
    rows += [[name, about, "–", origin] for name, about, origin in _plugin_datasets()]
    print_table(["name", "what", "images", "here"], rows)


def _plugin_datasets() -> list[tuple[str, str, str]]:
    """Return name, first line of the docstring and plug-in of each data set that a plug-in makes."""
    from qtdog.data.open import OWN_DATASETS
    from qtdog.training.plugins import load_entry_points, member_origins

    load_entry_points()
    origins = {name: origin for (axis, name), origin in member_origins().items() if axis == "dataset"}
    return [
        (name, (OWN_DATASETS[name].__doc__ or "").partition("\n")[0], f"plug-in {origin}")
        for name, origin in origins.items()
    ]


def _count(card: DatasetCard) -> str:
    return f"{card.n_expected:,}" + ("" if card.counts_from else " (not checked)")


def _here(name: str) -> str:
    """Where a data set that is known by name lies, or "" if it must be fetched first."""
    from qtdog.data.cards import ROTATED_DIGITS, data_root

    folder = data_root() / name
    if folder.is_dir():
        return str(folder)
    return "built in" if name == ROTATED_DIGITS.name else ""


@data_app.command(name="card")
def show_card(data: Annotated[str, DATA], *, as_json: JsonOutput = False) -> None:
    """Show a data set's card and its images per domain and class; of one that is not here, the card alone.

    Examples:
      qtdog data card rotated-digits

      qtdog data card photos/
    """
    from qtdog.cli.console import out, print_json, print_table
    from qtdog.data.cards import CARDS, check_counts
    from qtdog.data.open import is_text, open_dataset

    if is_text(data) or (data in list(CARDS) and not _here(data)):
        card = CARDS["amazon-reviews" if is_text(data) else data]
        print_json(asdict(card)) if as_json else _print_card(card)
        return
    dataset = open_dataset(data, min_domains=1)
    counts, differences = dataset.counts(), check_counts(dataset)
    if as_json:
        table = {
            d: dict(zip(dataset.classes, row.tolist(), strict=True))
            for d, row in zip(dataset.domains, counts, strict=True)
        }
        print_json(asdict(dataset.card) | {"counts": table, "differences": differences})
        return
    card = dataset.card
    _print_card(card)
    print_table(*_count_table(dataset.domains, dataset.classes, counts.tolist()))
    if card.expected_counts:
        out.print("counts agree with the dataset card" if not differences else "\n".join(differences), markup=False)


def _count_table(
    domains: Sequence[str], classes: Sequence[str], counts: Sequence[Sequence[int]]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a column per class, or per domain where there are more classes than domains and than ten."""
    rows = [[*map(str, row), f"{sum(row):,}"] for row in counts]
    if len(classes) <= max(len(domains), 10):
        return ["domain", *classes, "all"], [[name, *row] for name, row in zip(domains, rows, strict=True)]
    columns = zip(*rows, strict=True)
    return ["class", *domains], [[name, *row] for name, row in zip([*classes, "all"], columns, strict=True)]


def _print_card(card: DatasetCard) -> None:
    from qtdog.cli.console import out

    out.print(card.title, markup=False)
    for name in ("source", "licence", "paper", "metric", "note"):
        if value := getattr(card, name):
            out.print(f"  {name:8} {value}", markup=False, highlight=False, soft_wrap=True)
    if card.n_expected:
        counts = ", ".join(f"{domain} {n:,}" for domain, n in (card.expected_counts or {}).items())
        out.print(f"  expected {card.n_expected:,}{f' ({counts})' if counts else ''}", highlight=False, soft_wrap=True)
        checked = f"as in: {card.counts_from}" if card.counts_from else "not checked against another source"
        out.print(f"  counts   {checked}", markup=False, highlight=False, soft_wrap=True)
    if card.steps:
        text = f"{card.steps:,} steps, evaluated every {card.eval_every:,}"
        out.print(f"  protocol {text}", markup=False, highlight=False)


@data_app.command()
def verify(
    data: Annotated[str, DATA],
    *,
    near: Annotated[
        bool, typer.Option("--near", help="List images that look the same as well, not only exact copies.")
    ] = False,
    as_json: JsonOutput = False,
) -> None:
    """Read every image and list what is wrong; the exit code is 1 if anything is.

    Listed: unreadable images, empty classes, classes missing from a domain, the same image with two labels, exact
    copies across and within domains, what keeps the data set from being trained on, names that differ in their form
    alone, files that were probably meant to be images, differences from the dataset card, and files that are not as
    they were when the data set was fetched or imported.

    Examples:
      qtdog data verify photos/

      qtdog data verify pacs
    """
    from qtdog.cli.console import out, print_json

    report = _verified(data, near=near)
    if as_json:
        print_json(asdict(report))
    else:
        out.print(report.text(), markup=False, highlight=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


def _verified(data: str, *, near: bool) -> Report | TextReport:
    from qtdog.cli.console import CountingBar
    from qtdog.data.open import is_text, locate, open_dataset, open_texts
    from qtdog.data.verify import verify as check
    from qtdog.data.verify import verify_texts

    if is_text(data):
        root = locate(data) if data == "amazon-reviews" else Path(data)
        return verify_texts(open_texts(data), root)
    return check(open_dataset(data, min_domains=1), progress=CountingBar("reading images"), near=near)
