"""One self-contained page of finished runs: tables, charts, settings, analyses."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from qtdog import __version__
from qtdog.report.charts import curves_chart, dots_chart, latency_chart, main_cell, risk_chart, size_chart
from qtdog.report.inputs import Analysis, BenchFile, latencies
from qtdog.report.render import MISSING, Cell, Table
from qtdog.report.tables import estimate_text, methods_cost_table, percent, summary_table
from qtdog.runs.aggregate import SPLITS, Aggregate, aggregate
from qtdog.runs.find import RunSet
from qtdog.runs.finished import NO_TARGET, FinishedRun, class_counts, differing, label_rows, value_text
from qtdog.runs.selection import SELECTIONS, apply_selection
from qtdog.runs.statistics import percent_range, share_interval

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


def settings_table(rows: Mapping[str, Sequence[FinishedRun]], name: str) -> tuple[Table, list[tuple[str, str]]]:
    """Return a table of the settings that differ between methods, and those that all have, as (key, value)."""
    settings = {label: group[0].settings for label, group in rows.items() if group[0].settings}
    keys = differing(list(settings.values()))
    cells = [
        [_text_cell(label), *(_setting(one[key]) if key in one else Cell("") for key in keys)]
        for label, one in settings.items()
    ]
    shared = {key: value for one in settings.values() for key, value in one.items() if key not in keys}
    common = [(key, value_text(value)) for key, value in shared.items()]
    return Table("Settings that are not alike in all methods", ["method", *keys], cells, id=name), common


def _setting(value: Any) -> Cell:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(value_text(value), value=value if number else value_text(value))


def runs_table(rows: Mapping[str, Sequence[FinishedRun]], split: str, page: Path, name: str) -> Table:
    """Return a table of every run, with what its own selection gives and a link to its files."""
    head = ["run", "method", "unseen", "trial", "seed", "selection", "step", "target", "source", "gap", "file"]
    cells = [_run(label, run, split, page) for label, group in rows.items() for run in group]
    return Table("Every run, with the checkpoint in its model file", head, cells, id=name)


def _run(label: str, run: FinishedRun, split: str, page: Path) -> list[Cell]:
    selection = run.selection or "source"
    selected = run.saved or apply_selection(run, selection)
    target, source = (None, None) if selected is None else (selected.on(split), selected.source)
    gap = None if target is None or source is None else source - target
    file = run.path if run.kind == "domainbed" else run.path / "result.json"
    step = None if selected is None else selected.step
    size = run.cost.size.get("bytes")
    return [
        Cell(_run_name(run), value=run.path.name, href=link(file, page)),
        *map(_text_cell, (label, run.target)),
        _several([member.trial for member in run.replicate.members]),
        _several([member.seed for member in run.replicate.members]),
        _text_cell(selection),
        Cell(MISSING if step is None else f"{step:,}", value=step),
        *(Cell(percent(value), value=value) for value in (target, source, gap)),
        Cell(MISSING if size is None else f"{size / 1e6:.3g} MB", value=size),
    ]


def _run_name(run: FinishedRun) -> str:
    """Return the name of a run's folder, or in words what it is where the folder is named by a hash."""
    name = run.path.name
    if not re.fullmatch(r"[0-9a-f]{12}", name):
        return name
    seeds = ", ".join(str(member.seed) for member in run.replicate.members)
    return f"{run.target}, seed {seeds} ({name[:4]}…)"


MAX_MISTAKES = 15  # classes that are shown


def mistakes_table(rows: Mapping[str, Sequence[FinishedRun]], name: str) -> Table:
    """Return the classes of unseen domains that are surely worst, by the upper end of the interval, over all trials."""
    found = []
    for label, group in rows.items():
        for (domain, class_name), counts in class_counts(group).items():
            n, right = sum(counts.values()), counts.get(class_name, 0)
            called = sorted(((count, one) for one, count in counts.items() if one != class_name), reverse=True)
            found.append((share_interval(right / n, n), label, domain, class_name, n, right, called))
    worst = sorted(found, key=lambda one: one[0][1])[:MAX_MISTAKES]
    cells = [
        [
            *map(_text_cell, (label, domain, class_name)),
            Cell(percent(right / n), value=right / n),
            Cell(percent_range(interval), value=interval[1]),
            Cell(f"{right:,} of {n:,}", value=right),
            _text_cell(", ".join(f"{one} ({count:,})" for count, one in called[:3])),
        ]
        for interval, label, domain, class_name, n, right, called in worst
        if right < n
    ]
    head = ["method", "unseen", "class", "accuracy (%)", "95 % interval", "right", "taken for"]
    return Table(
        f"The {len(cells)} classes that are surely worst (upper end of the interval), over all trials",
        head,
        cells,
        id=name,
    )


def _text_cell(text: str) -> Cell:
    return Cell(text, value=text)


def _several(numbers: Sequence[int]) -> Cell:
    """Return a cell with the trials or seeds of a run or of an ensemble's members, sorted by the first."""
    return Cell(", ".join(map(str, sorted(set(numbers)))), value=min(numbers))


def numbers_table(numbers: Sequence[Mapping[str, Any]], caption: str, name: str) -> Table:
    """Return the numbers of an analysis, the first 200 rows of them."""
    keys = list(dict.fromkeys(key for row in numbers for key in row))
    rows = [[_number(row.get(key)) for key in keys] for row in numbers[:MAX_NUMBERS]]
    return Table(caption, keys, rows, id=name)


def _number(value: Any) -> Cell:
    if value is None:
        return Cell(MISSING)
    if isinstance(value, float):
        return Cell(f"{value:.4g}", value=value)
    number = isinstance(value, int) and not isinstance(value, bool)
    return Cell(value_text(value), value=value if number else value_text(value))


MAX_FIGURE_BYTES = 3_000_000  # of all figures together; in base64 they take a third more, and the page stays below 5 MB


@dataclass(frozen=True)
class PageOptions:
    """What a page is made with.

    Attributes:
        out: where it will lie: links are relative to it.
        title: of the page.
        split: `whole` or `80`.
        pooled: one row per method, as in `runs.aggregate.aggregate`.
        analyses: to show.
        bench: latencies, or None.
    """

    out: Path
    title: str = "qtdog report"
    split: str = "whole"
    pooled: bool = False
    analyses: Sequence[Analysis] = ()
    bench: BenchFile | None = None


def build_page(run_set: RunSet, options: PageOptions) -> str:
    """Return the HTML of a report.

    Args:
        run_set: what to report.
        options: how.

    Example:
        >>> from qtdog.runs.find import find_runs
        >>> page = build_page(find_runs([Path("runs/float")]), PageOptions(Path("report.html")))
        >>> "<title>qtdog report</title>" in page
        True
    """
    groups = [_group(number, run_set.of(name), options) for number, name in enumerate(run_set.datasets)]
    measured = {one.selection for group in groups for one, _ in group["tables"]}
    style, script = asset("style.css"), "".join(map(asset, ("tables.js", "panel.js", "charts.js")))
    return _template().render(
        title=options.title,
        version=__version__,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        groups=groups,
        split=SPLITS[options.split],
        selections={name: text for name, text in SELECTIONS.items() if name in measured},
        left_out=[f"{n} {reason}" for reason, n in run_set.left_out.items()],
        n_entries=len(run_set.runs),
        unfinished=[(path.name, link(path, options.out)) for path in run_set.unfinished],
        analyses=_analyses(options),
        charts=json_for_html({chart["id"]: chart for group in groups for chart in group["charts"]}),
        style=Markup(style),
        script=Markup(script),
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(asset("report.html"))


def _group(number: int, runs: Sequence[FinishedRun], options: PageOptions) -> dict[str, Any]:
    """Return what the template needs of one data set."""
    name = f"g{number}"
    made = [aggregate(runs, one, split=options.split, pooled=options.pooled) for one in SELECTIONS]
    tables = [one for one in made if one.rows]
    rows = label_rows([run for run in runs if run.target != NO_TARGET], pooled=options.pooled)
    settings, common = settings_table(rows, f"{name}-settings")
    return {
        "id": name,
        "dataset": runs[0].dataset,
        "tables": [(one, summary_table(one, f"{name}-{one.selection}", with_costs=False)) for one in tables],
        "costs": methods_cost_table(tables, f"{name}-costs"),
        "mistakes": mistakes_table(rows, f"{name}-mistakes"),
        "tiles": _tiles(runs, rows, tables),
        "charts": [one for one in _charts(rows, tables, options, name) if _filled(one)],
        "settings": settings,
        "common": common,
        "runs": runs_table(label_rows(runs, pooled=options.pooled), options.split, options.out, f"{name}-runs"),
        "environments": _environments(runs),
    }


def _charts(
    rows: Mapping[str, Sequence[FinishedRun]], tables: Sequence[Aggregate], options: PageOptions, name: str
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
        "curves": (
            "Accuracy over steps",
            "A panel per unseen domain. Solid: the unseen domain. Dashed: the sources. An ensemble is one point at "
            "the end.",
        ),
        "risk": (
            "Errors that are left",
            "Share of wrong answers among the images that are answered, the most confident first. Solid: the unseen "
            "domain. Dashed: held-out images of the sources.",
        ),
    }
    made = {
        "dots": dots_chart(tables),
        "size": size_chart(tables),
        "latency": latency_chart(tables, measured),
        "curves": curves_chart(rows),
        "risk": risk_chart(rows),
    }
    names = list(rows)
    return [
        chart | {"id": f"{name}-{key}", "names": names, "title": about[key][0], "about": about[key][1]}
        for key, chart in made.items()
    ]


def _filled(chart: Mapping[str, Any]) -> bool:
    return any(chart["sets"].values()) if "sets" in chart else bool(chart["panels"])


def _tiles(
    runs: Sequence[FinishedRun], rows: Mapping[str, Sequence[FinishedRun]], tables: Sequence[Aggregate]
) -> list[tuple[str, str, str]]:
    """Return (number, what it is, of what) for the head of a section."""
    targets = sorted({run.target for run in runs if run.target != NO_TARGET})
    tiles = [
        (f"{len(runs):,}", "finished runs", count(len(rows), "method")),
        (str(len(targets)), "unseen domains", ", ".join(targets)),
    ]
    source = next((one for one in tables if one.selection == "source"), None)
    cells = [] if source is None else [(main_cell(source, row.cells), row.method) for row in source.rows]
    known = [(cell, method) for cell, method in cells if cell.mean is not None]
    if known:
        cell, method = max(known, key=lambda one: one[0].mean or 0.0)
        tiles.append((estimate_text(cell), "highest accuracy (%), selection 'source'", method))
    sizes = [(run.cost.size["bytes"], label) for label, group in rows.items() for run in group if run.cost.size]
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


def _environments(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the machines that the runs were made on, each in one line."""
    lines = []
    for run in runs:
        where = run.result.get("environment")
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
