"""One self-contained page of finished runs: tables, charts, settings, analyses."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qtdog import __version__
from qtdog.report.charts import curves_chart, dots_chart, latency_chart, main_cell, size_chart
from qtdog.report.inputs import Analysis, BenchFile, latencies
from qtdog.report.tables import SPLITS, Block, differing, label_rows, make_block, percent, value_text
from qtdog.report.text_tables import MISSING, body, estimate_text, headers
from qtdog.runs.find import Found
from qtdog.runs.finished import NO_TARGET, FinishedRun
from qtdog.runs.selection import SELECTIONS, apply_selection

# in JSON these stand in strings only, and in HTML they could end the element that holds the JSON
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def asset(name: str) -> str:
    """Return the text of a file of `report/assets`."""
    return (resources.files("qtdog") / "report" / "assets" / name).read_text()


def json_for_html(value: Any) -> Markup:
    r"""Return JSON that can stand in a `<script type="application/json">`: no string in it can end the element.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.

    Example:
        >>> print(json_for_html({"name": "</script><img src=x>"}))
        {"name":"\u003c/script\u003e\u003cimg src=x\u003e"}
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup("".join(ESCAPES.get(character, character) for character in text))


def csp_hash(text: str) -> Markup:
    """Return the source expression by which a content security policy allows just this script or style.

    Example:
        >>> csp_hash("")
        Markup("'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='")
    """
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")


def data_uri(png: Path) -> str:
    """Return a PNG as a `data:` address."""
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def link(path: Path, page: Path) -> str:
    """Return the relative address of a file from the page that names it; no name in it can be read as anything else.

    Example:
        >>> link(Path("runs/a b/result.json"), Path("runs/report.html"))
        'a%20b/result.json'
        >>> link(Path("javascript:x"), Path("report.html"))
        'javascript%3Ax'
    """
    return quote(os.path.relpath(path, page.parent))


MAX_NUMBERS = 200  # rows of an analysis that are shown; all are in its CSV


@dataclass(frozen=True)
class WebCell:
    """A cell.

    Attributes:
        text: what is shown.
        value: what is sorted by; None for a missing value, which always comes last.
        mark: `best`, `second` or nothing.
        href: where it leads; empty for nowhere.
    """

    text: str
    value: float | str | None
    mark: str = ""
    href: str = ""


@dataclass(frozen=True)
class WebTable:
    """A table that sorts and filters.

    Attributes:
        id: unique in the page.
        caption: what it shows.
        headers: names of the columns.
        rows: cells; the first of each row is its header.
    """

    id: str
    caption: str
    headers: list[str]
    rows: list[list[WebCell]]

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether it holds numbers only."""
        columns = [[row[i] for row in self.rows] for i in range(len(self.headers))]
        return [all(not isinstance(cell.value, str) for cell in column) for column in columns]


def block_table(block: Block, name: str) -> WebTable:
    """Return a table in DomainBed's layout for the page."""
    rows = []
    for row, cells in zip(block.rows, body(block), strict=True):
        accuracies = [row.cells[column].mean for column in block.columns]
        costs = [row.n_trials, row.cost.size.get("bytes"), row.n_models, row.cost.training_steps, row.cost.passes]
        values = [row.method, *accuracies, *costs]
        rows.append([WebCell(cell.text, value, cell.mark) for cell, value in zip(cells, values, strict=True)])
    return WebTable(name, block.title, headers(block), rows)


def settings_table(rows: Mapping[str, Sequence[FinishedRun]], name: str) -> tuple[WebTable, list[tuple[str, str]]]:
    """Return a table of the settings that differ between methods, and those that all have, as (key, value)."""
    settings = {label: group[0].settings for label, group in rows.items() if group[0].settings}
    keys = differing(list(settings.values()))
    cells = [
        [WebCell(label, label), *(_setting(one[key]) if key in one else WebCell("", None) for key in keys)]
        for label, one in settings.items()
    ]
    shared = {key: value for one in settings.values() for key, value in one.items() if key not in keys}
    common = [(key, value_text(value)) for key, value in shared.items()]
    return WebTable(name, "Settings that are not alike in all methods", ["method", *keys], cells), common


def _setting(value: Any) -> WebCell:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return WebCell(value_text(value), value if number else value_text(value))


def runs_table(rows: Mapping[str, Sequence[FinishedRun]], split: str, page: Path, name: str) -> WebTable:
    """Return a table of every run, with what its own selection gives and a link to its files."""
    head = ["run", "method", "unseen", "trial", "seed", "selection", "step", "target", "source", "gap", "file"]
    cells = [_run(label, entry, split, page) for label, group in rows.items() for entry in group]
    return WebTable(name, "Every run, with the checkpoint that it ships", head, cells)


def _run(label: str, entry: FinishedRun, split: str, page: Path) -> list[WebCell]:
    selection = entry.selection or "source"
    found = apply_selection(entry, selection)
    target, source = (None, None) if found is None else (found.on(split), found.source)
    gap = None if target is None or source is None else source - target
    file = entry.path if entry.kind == "domainbed" else entry.path / "result.json"
    step = None if found is None else found.step
    size = entry.cost.size.get("bytes")
    numbers = [WebCell(percent(value), value) for value in (target, source, gap)]
    return [
        WebCell(entry.path.name, entry.path.name, href=link(file, page)),
        WebCell(label, label),
        WebCell(entry.target, entry.target),
        WebCell(str(entry.trial), entry.trial),
        WebCell(str(entry.seed), entry.seed),
        WebCell(selection, selection),
        WebCell(MISSING if step is None else f"{step:,}", step),
        *numbers,
        WebCell(MISSING if size is None else f"{size / 1e6:.3g} MB", size),
    ]


def numbers_table(numbers: Sequence[Mapping[str, Any]], caption: str, name: str) -> WebTable:
    """Return the numbers of an analysis, the first 200 rows of them."""
    keys = list(dict.fromkeys(key for row in numbers for key in row))
    rows = [[_number(row.get(key)) for key in keys] for row in numbers[:MAX_NUMBERS]]
    return WebTable(name, caption, keys, rows)


def _number(value: Any) -> WebCell:
    if value is None:
        return WebCell(MISSING, None)
    if isinstance(value, float):
        return WebCell(f"{value:.4g}", value)
    number = isinstance(value, int) and not isinstance(value, bool)
    return WebCell(value_text(value), value if number else value_text(value))


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


def _group(number: int, entries: Sequence[FinishedRun], options: PageOptions) -> dict[str, Any]:
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
    rows: Mapping[str, Sequence[FinishedRun]], blocks: Sequence[Block], options: PageOptions, name: str
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
    entries: Sequence[FinishedRun], rows: Mapping[str, Sequence[FinishedRun]], blocks: Sequence[Block]
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


def _environments(entries: Sequence[FinishedRun]) -> list[str]:
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
