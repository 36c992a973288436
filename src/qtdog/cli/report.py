"""`qtdog report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtdog.cli.table import Split

RUNS = "Run folders, folders of them, DomainBed's results.jsonl; folders with an analysis.json beside or below."
SPLIT = "Count the 'whole' unseen domain or DomainBed's '80' % split. Default: 80 if DomainBed's runs are there."
BEST = "One row per method: of several settings in a trial, the best by the selection's own score (DomainBed's search)."


def report(
    runs: Annotated[list[Path], typer.Argument(help=RUNS, metavar="RUNS...")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Of the page.")] = "qtdog report",
    bench: Annotated[Path | None, typer.Option(help="bench.json of 'qtdog bench', for accuracy over latency.")] = None,
    split: Annotated[Split | None, typer.Option(help=SPLIT)] = None,
    best_of_settings: Annotated[bool, typer.Option("--best-of-settings", help=BEST)] = False,
) -> None:
    """Write one page with tables, charts, settings and analyses of finished runs. It needs no network and no server.

    Examples:
      qtdog report runs/pacs -o pacs.html

      qtdog report runs/pacs runs/analyses old/domainbed/results.jsonl --bench bench.json -o pacs.html
    """
    from qtdog.cli.console import err, warn
    from qtdog.cli.table import checked_datasets, choose_split, say_left_out
    from qtdog.core.errors import ConfigError
    from qtdog.core.files import write_atomic
    from qtdog.report.html import PageOptions, build_page
    from qtdog.report.inputs import find_analyses, latencies, read_bench
    from qtdog.runs.find import find

    if out.is_dir():
        raise ConfigError(f"{out} is a folder; -o takes the file to write, like {out / 'report.html'}")
    found = find(runs)
    checked_datasets(found, per_dataset=True)
    measured = None if bench is None else read_bench(bench)
    if measured is not None and not latencies({"": found.entries}, measured):
        warn(f"no file in {bench} lies in the folder of a run, so there is no chart of latencies")
    options = PageOptions(
        out=out,
        title=title,
        split=choose_split(found, None if split is None else split.value),
        pooled=best_of_settings,
        analyses=find_analyses(runs),
        bench=measured,
    )
    write_atomic(out, build_page(found, options))
    say_left_out(found)
    err.print(f"report  {out.resolve()}", highlight=False, soft_wrap=True, markup=False)
