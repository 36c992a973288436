"""How tables are written: golden files, LaTeX that compiles, narrow terminals."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from qtdog.report.render import MAX_LATEX_ROWS, Cell, Table, text_cells, to_latex, to_text

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return runpy.run_path(str(HERE / "make_golden.py"))["tables"](tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", sorted(path.name for path in (HERE / "golden").iterdir()))
def test_tables_are_as_in_the_golden_files(fresh: dict[str, str], name: str):
    assert fresh[name] == (HERE / "golden" / name).read_text()


def test_every_golden_file_is_made(fresh: dict[str, str]):
    assert sorted(fresh) == sorted(path.name for path in (HERE / "golden").iterdir())


@pytest.mark.parametrize("name", ["table.tex", "compare.tex"])
def test_latex_compiles(fresh: dict[str, str], name: str, tmp_path: Path):
    program = next((found for found in map(shutil.which, ("pdflatex", "lualatex", "tectonic")) if found), None)
    if program is None:
        pytest.skip("no TeX is installed")
    preamble = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
    (tmp_path / "table.tex").write_text(f"{preamble}{fresh[name]}\\end{{document}}\n")
    options = [] if program.endswith("tectonic") else ["-interaction=nonstopmode", "-halt-on-error"]
    told = subprocess.run([program, *options, "table.tex"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-2000:]


WIDE = Table(
    "accuracy",
    ["method", *(f"domain {i}" for i in range(12))],
    [[Cell("erm + lsq 7 bit"), *(Cell(f"{50 + i}.{j} ± 0.{i}", "best") for i in range(12))] for j in range(3)],
    ["A note."],
)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_narrow_terminal_breaks_and_drops_no_cell(width: int):
    text = to_text([WIDE], width)
    for row in WIDE.rows:
        for cell in row:
            assert f"{cell.text}*" in text if cell.mark else cell.text in text
    for name in WIDE.headers:
        assert re.search(rf"\b{name}\b", text)
    # one column beside the names is the least
    assert max(map(len, text.splitlines())) <= max(width, 17 + 2 + 12)


def test_a_pipe_gets_each_row_on_one_line():
    lines = to_text([WIDE]).splitlines()
    assert sum(line.startswith("erm") for line in lines) == 3


def test_a_long_table_goes_on_in_another_environment():
    long = Table("t", ["a", "b"], text_cells([[str(i), "1"] for i in range(2 * MAX_LATEX_ROWS + 1)]))
    text = to_latex([long])
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3
    assert text.count("(continued)") == 2
    assert text.count(r" & 1 \\") == 2 * MAX_LATEX_ROWS + 1
