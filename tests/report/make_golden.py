"""Write the golden tables: `python tests/report/make_golden.py`, then look at the difference before committing it."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path

from qtdog.report.render import render
from qtdog.report.tables import comparison_table, numbers_csv, summary_table
from qtdog.runs.aggregate import aggregate, compare_methods
from qtdog.runs.find import find_runs

HERE = Path(__file__).parent
ENDINGS = {"text": "txt", "markdown": "md", "latex": "tex", "csv": "csv"}


def tables(root: Path) -> dict[str, str]:
    """Return the content of each golden file by its name.

    Args:
        root: an empty folder.
    """
    made = runpy.run_path(str(HERE / "made_runs.py"))
    made["make_study"](root / "study")
    made["make_domainbed"](root / "old" / "results.jsonl")
    runs = find_runs([root]).of("pacs")
    made_tables = [aggregate(runs, selection, split="80") for selection in ("source", "mean", "last", "oracle")]
    shown = [summary_table(one) for one in made_tables]
    pair = ("erm + float", "erm + lsq 7 bit")
    comparisons = [one for name in ("source", "mean") if (one := compare_methods(runs, pair, name)) is not None]
    contents = {
        f"table.{ending}": numbers_csv(made_tables) if kind == "csv" else render(shown, kind)
        for kind, ending in ENDINGS.items()
    }
    table = comparison_table(f"pacs: A = {pair[0]}, B = {pair[1]}", comparisons)
    return contents | {f"compare.{ending}": render([table], kind) for kind, ending in ENDINGS.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, content in tables(Path(folder)).items():
            (HERE / "golden" / name).write_text(content)
