"""`qtdog data list | card | verify | fetch | import`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtdog.cli.data_fetch import fetch, import_folder

if TYPE_CHECKING:
    from qtdog.data.cards import Datasheet
    from qtdog.data.verify import Report, TextReport

data_app = typer.Typer(
    no_args_is_help=True, help="Get data sets and look at them: what is known, what is in a folder, what is broken."
)
data_app.command()(fetch)
data_app.command(name="import")(import_folder)
DATA = typer.Argument(
    help="Data set name, folder ROOT/DOMAIN/CLASS/image, or .csv/.jsonl manifest[:COLUMN].", metavar="DATA"
)
AS_JSON = typer.Option("--json", help="Print JSON.")


@data_app.command(name="list")
def list_cards(*, as_json: Annotated[bool, AS_JSON] = False) -> None:
    """List the data sets that are known by name, and whether they are here. Any folder DOMAIN/CLASS/image works too.

    Example:
      qtdog data list
    """
    from qtdog.cli.console import print_json, print_table
    from qtdog.data.cards import CARDS

    if as_json:
        print_json([asdict(CARDS[name]) | {"here": _here(name)} for name in CARDS])
        return
    rows = [[name, CARDS[name].title, _count(CARDS[name]), _here(name) or "–"] for name in CARDS]
    print_table(["name", "what", "images", "here"], rows)


def _count(sheet: Datasheet) -> str:
    return f"{sheet.n_expected:,}" + ("" if sheet.counts_from else " (not checked)")


def _here(name: str) -> str:
    """Where a data set that is known by name lies, or "" if it must be fetched first."""
    from qtdog.data.cards import CARDS, data_home

    folder = data_home() / name
    if folder.is_dir():
        return str(folder)
    return "" if CARDS[name].archives or CARDS[name].kind != "folders" else "built in"


@data_app.command()
def card(data: Annotated[str, DATA], *, as_json: Annotated[bool, AS_JSON] = False) -> None:
    """Show a data set's datasheet and its images per domain and class; of one that is not here, the datasheet alone.

    Examples:
      qtdog data card rotated-digits

      qtdog data card photos/
    """
    from qtdog.cli.console import out, print_json, print_table
    from qtdog.data.cards import CARDS, check_counts
    from qtdog.data.open import is_text, open_dataset

    if is_text(data) or (data in list(CARDS) and not _here(data)):
        sheet = CARDS["amazon-reviews" if is_text(data) else data]
        print_json(asdict(sheet)) if as_json else _show_sheet(sheet)
        return
    dataset = open_dataset(data, min_domains=1)
    counts, differences = dataset.counts(), check_counts(dataset)
    if as_json:
        table = {
            d: dict(zip(dataset.classes, row.tolist(), strict=True))
            for d, row in zip(dataset.domains, counts, strict=True)
        }
        print_json(asdict(dataset.sheet) | {"counts": table, "differences": differences})
        return
    sheet = dataset.sheet
    _show_sheet(sheet)
    rows = [[d, *map(str, row.tolist()), f"{row.sum():,}"] for d, row in zip(dataset.domains, counts, strict=True)]
    print_table(["domain", *dataset.classes, "all"], rows)
    if sheet.expected_counts:
        out.print("counts agree with the datasheet" if not differences else "\n".join(differences), markup=False)


def _show_sheet(sheet: Datasheet) -> None:
    from qtdog.cli.console import out

    out.print(sheet.title, markup=False)
    for name in ("source", "licence", "paper", "metric", "note"):
        if value := getattr(sheet, name):
            out.print(f"  {name:8} {value}", markup=False, highlight=False, soft_wrap=True)
    if sheet.n_expected:
        counts = ", ".join(f"{domain} {n:,}" for domain, n in (sheet.expected_counts or {}).items())
        out.print(f"  expected {sheet.n_expected:,}{f' ({counts})' if counts else ''}", highlight=False, soft_wrap=True)
        checked = f"as in: {sheet.counts_from}" if sheet.counts_from else "not checked against another source"
        out.print(f"  counts   {checked}", markup=False, highlight=False, soft_wrap=True)
    if sheet.steps:
        text = f"{sheet.steps:,} steps, evaluated every {sheet.eval_every:,}"
        out.print(f"  protocol {text}", markup=False, highlight=False)


@data_app.command()
def verify(data: Annotated[str, DATA], *, as_json: Annotated[bool, AS_JSON] = False) -> None:
    """Read every image and list what is wrong; the exit code is 1 if anything is.

    Listed: unreadable images, empty classes, classes missing from a domain, exact duplicates across domains,
    differences from the datasheet, and files that are not as they were when the data set was fetched or imported.

    Examples:
      qtdog data verify photos/

      qtdog data verify pacs
    """
    from qtdog.cli.console import out, print_json

    report = _verified(data)
    if as_json:
        print_json(asdict(report))
    else:
        out.print(report.text(), markup=False, highlight=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


def _verified(data: str) -> Report | TextReport:
    from qtdog.cli.progress import CountingBar
    from qtdog.data.open import is_text, locate, open_dataset, open_texts
    from qtdog.data.verify import verify as check
    from qtdog.data.verify import verify_texts

    if is_text(data):
        root = locate(data) if data == "amazon-reviews" else Path(data)
        return verify_texts(open_texts(data), root)
    return check(open_dataset(data, min_domains=1), progress=CountingBar("reading images"))
