"""One self-contained page of finished runs: tables, charts, settings, analyses."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qtdog import __version__
from qtdog.report.analyses import Analysis
from qtdog.report.block import SPLITS, Block, make_block
from qtdog.report.charts import curves_chart, dots_chart, latency_chart, main_cell, size_chart
from qtdog.report.embed import asset, csp_hash, data_uri, json_for_html, link
from qtdog.report.labels import label_rows
from qtdog.report.latency import BenchFile, latencies
from qtdog.report.marks import estimate_text
from qtdog.report.table import NO_TARGET
from qtdog.report.web_table import block_table, numbers_table, runs_table, settings_table
from qtdog.runs.entry import Entry
from qtdog.runs.find import Found
from qtdog.runs.selection import SELECTIONS

MAX_FIGURE_BYTES = 3_000_000  # of all figures together; in base64 they take a third more, and the page stays below 5 MB


@dataclass(frozen=True)
class PageOptions:
    """What a page is made with.

    Attributes:
        out: where it will lie: links are relative to it.
        title: of the page.
        split: `whole` or `80`.
        pooled: one row per method, as in `block.make_block`.
        analyses: to show.
        bench: latencies, or None.
    """

    out: Path
    title: str = "qtdog report"
    split: str = "whole"
    pooled: bool = False
    analyses: Sequence[Analysis] = ()
    bench: BenchFile | None = None


def build_page(found: Found, options: PageOptions) -> str:
    """Return the HTML of a report.

    Args:
        found: what to report.
        options: how.

    Example:
        >>> from qtdog.runs.find import find
        >>> page = build_page(find([Path("runs/pacs")]), PageOptions(Path("report.html")))  # doctest: +SKIP
    """
    groups = [_group(number, found.of(name), options) for number, name in enumerate(found.datasets)]
    style, script = asset("style.css"), "".join(map(asset, ("tables.js", "panel.js", "charts.js")))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(asset("report.html")).render(
        title=options.title,
        version=__version__,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        groups=groups,
        split=SPLITS[options.split],
        selections=SELECTIONS,
        n_entries=len(found.entries),
        unfinished=[(path.name, link(path, options.out)) for path in found.unfinished],
        analyses=_analyses(options),
        charts=json_for_html({chart["id"]: chart for group in groups for chart in group["charts"]}),
        style=Markup(style),
        script=Markup(script),
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
    )


def _group(number: int, entries: Sequence[Entry], options: PageOptions) -> dict[str, Any]:
    """Return what the template needs of one data set."""
    name = f"g{number}"
    made = [make_block(entries, one, split=options.split, pooled=options.pooled) for one in SELECTIONS]
    blocks = [block for block in made if block.rows]
    rows = label_rows([entry for entry in entries if entry.target != NO_TARGET], pooled=options.pooled)
    settings, common = settings_table(rows, f"{name}-settings")
    return {
        "id": name,
        "dataset": entries[0].dataset,
        "blocks": [(block, block_table(block, f"{name}-{block.selection}")) for block in blocks],
        "tiles": _tiles(entries, rows, blocks),
        "charts": [one for one in _charts(rows, blocks, options, name) if _filled(one)],
        "settings": settings,
        "common": common,
        "runs": runs_table(label_rows(entries, pooled=options.pooled), options.split, options.out, f"{name}-runs"),
        "environments": _environments(entries),
    }


def _charts(
    rows: Mapping[str, Sequence[Entry]], blocks: Sequence[Block], options: PageOptions, name: str
) -> list[dict[str, Any]]:
    measured = latencies(rows, options.bench) if options.bench else {}
    runtimes = ", ".join(sorted({one.runtime for one in measured.values()}))
    setting = f"{options.bench.setting}; {runtimes}" if options.bench else ""
    about = {
        "dots": (
            "Accuracy of each method",
            "Large: average over unseen domains ± standard error. Small: each one.",
        ),
        "size": ("Accuracy and size", "The line joins what nothing beats in both: smaller and more accurate."),
        "latency": ("Accuracy and latency", f"Median of a call as 'qtdog bench' measured it: {setting}."),
        "curves": ("Accuracy over steps", "A panel per unseen domain. Solid: the unseen domain. Dashed: the sources."),
    }
    made = {
        "dots": dots_chart(blocks),
        "size": size_chart(blocks),
        "latency": latency_chart(blocks, measured),
        "curves": curves_chart(rows),
    }
    names = list(rows)
    return [
        chart | {"id": f"{name}-{key}", "names": names, "title": about[key][0], "about": about[key][1]}
        for key, chart in made.items()
    ]


def _filled(chart: Mapping[str, Any]) -> bool:
    return any(chart["sets"].values()) if "sets" in chart else bool(chart["panels"])


def _tiles(
    entries: Sequence[Entry], rows: Mapping[str, Sequence[Entry]], blocks: Sequence[Block]
) -> list[tuple[str, str, str]]:
    """Return (number, what it is, of what) for the head of a section."""
    targets = sorted({entry.target for entry in entries if entry.target != NO_TARGET})
    tiles = [
        (f"{len(entries):,}", "finished runs", count(len(rows), "method")),
        (str(len(targets)), "unseen domains", ", ".join(targets)),
    ]
    source = next((block for block in blocks if block.selection == "source"), None)
    cells = [] if source is None else [(main_cell(source, row.cells), row.method) for row in source.rows]
    known = [(cell, method) for cell, method in cells if cell.mean is not None]
    if known:
        cell, method = max(known, key=lambda one: one[0].mean or 0.0)
        tiles.append((estimate_text(cell), "highest accuracy (%), selection 'source'", method))
    sizes = [(entry.cost.size["bytes"], label) for label, group in rows.items() for entry in group if entry.cost.size]
    if sizes:
        n_bytes, label = min(sizes)
        tiles.append((f"{n_bytes / 1e6:.3g} MB", "smallest file", label))
    return tiles


def count(n: int, what: str) -> str:
    """Return a number and what it counts.

    Example:
        >>> count(1, "trial"), count(3, "trial")
        ('1 trial', '3 trials')
    """
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _environments(entries: Sequence[Entry]) -> list[str]:
    """Return the machines that the runs were made on, each in one line."""
    lines = []
    for entry in entries:
        where = entry.result.get("environment")
        if isinstance(where, Mapping):
            parts = [
                where.get("gpu") or where.get("cpu"),
                f"{where.get('n_cores')} cores",
                f"torch {where.get('torch')}",
            ]
            lines.append(", ".join(str(part) for part in parts))
    return list(dict.fromkeys(lines))


def _analyses(options: PageOptions) -> list[dict[str, Any]]:
    """Return what the template needs of each analysis; figures beyond the page's size are linked, not embedded."""
    shown, left = [], MAX_FIGURE_BYTES
    for number, one in enumerate(options.analyses):
        figures = []
        for png in one.figures:
            n_bytes = png.stat().st_size
            fits = n_bytes <= left
            left -= n_bytes if fits else 0
            figures.append((png.name, data_uri(png) if fits else "", link(png, options.out)))
        table = numbers_table(one.numbers, f"Numbers: {one.title}", f"a{number}") if one.numbers else None
        files = [(file.name, link(file, options.out)) for file in one.files]
        shown.append({"analysis": one, "figures": figures, "table": table, "files": files})
    return shown
