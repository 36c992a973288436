"""`qtdog data list | card | verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

data_app = typer.Typer(
    no_args_is_help=True, help="Look at data sets: what is known, what is in a folder, what is broken."
)
DATA = typer.Argument(help="Data set name, folder ROOT/DOMAIN/CLASS/image, or .csv/.jsonl manifest.", metavar="DATA")
AS_JSON = typer.Option("--json", help="Print JSON.")


@data_app.command(name="list")
def list_cards(*, as_json: Annotated[bool, AS_JSON] = False) -> None:
    """List the data sets that are known by name. Any folder ROOT/DOMAIN/CLASS/image works as well.

    Example:
      qtdog data list
    """
    from qtdog.cli.console import print_json, print_table
    from qtdog.data.cards import CARDS

    if as_json:
        print_json([asdict(CARDS[name]) for name in CARDS])
        return
    rows = [
        [name, CARDS[name].title, f"{sum((CARDS[name].expected_counts or {}).values()):,}", CARDS[name].licence]
        for name in CARDS
    ]
    print_table(["name", "what", "images", "licence"], rows)


@data_app.command()
def card(data: Annotated[str, DATA], *, as_json: Annotated[bool, AS_JSON] = False) -> None:
    """Show a data set's datasheet and its images per domain and class.

    Examples:
      qtdog data card rotated-digits

      qtdog data card photos/
    """
    from qtdog.cli.console import out, print_json, print_table
    from qtdog.data.cards import check_counts
    from qtdog.data.open import open_dataset

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
    out.print(sheet.title, markup=False)
    for name in ("source", "licence", "paper", "metric"):
        out.print(f"  {name:8} {getattr(sheet, name) or '–'}", markup=False, highlight=False)
    rows = [[d, *map(str, row.tolist()), f"{row.sum():,}"] for d, row in zip(dataset.domains, counts, strict=True)]
    print_table(["domain", *dataset.classes, "all"], rows)
    if sheet.expected_counts:
        out.print("counts agree with the datasheet" if not differences else "\n".join(differences), markup=False)


@data_app.command()
def verify(data: Annotated[str, DATA], *, as_json: Annotated[bool, AS_JSON] = False) -> None:
    """Read every image and list what is wrong; the exit code is 1 if anything is.

    Listed: unreadable images, empty classes, classes missing from a domain, exact duplicates across domains, and
    differences from the datasheet.

    Example:
      qtdog data verify photos/
    """
    from qtdog.cli.console import out, print_json
    from qtdog.cli.progress import CountingBar
    from qtdog.data.open import open_dataset
    from qtdog.data.verify import verify as check

    report = check(open_dataset(data, min_domains=1), progress=CountingBar("reading images"))
    if as_json:
        print_json(asdict(report))
    else:
        out.print(report.text(), markup=False, highlight=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)
