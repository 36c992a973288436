"""Write the golden tables: `python tests/report/make_golden.py`, then look at the difference before committing it."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path

from qtdog.report.compare import compare, comparison_sheet
from qtdog.report.tables import make_block
from qtdog.report.text_tables import SHEETS, render
from qtdog.runs.find import find

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
    entries = find([root]).of("pacs")
    blocks = [make_block(entries, selection, split="80") for selection in ("source", "mean", "last", "oracle")]
    pair = ("erm + float", "erm + lsq 7 bit")
    found = [one for name in ("source", "mean") if (one := compare(entries, pair, name)) is not None]
    contents = {f"table.{ending}": render(blocks, kind) for kind, ending in ENDINGS.items()}
    sheet = comparison_sheet(f"pacs: A = {pair[0]}, B = {pair[1]}", found)
    return contents | {f"compare.{ending}": SHEETS[kind]([sheet]) for kind, ending in ENDINGS.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, content in tables(Path(folder)).items():
            (HERE / "golden" / name).write_text(content)
