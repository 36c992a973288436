"""`qtdog table` and `qtdog report` as a user calls them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qtdog.cli.main import main


class Outcome(NamedTuple):
    """Exit code, standard output and standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def qtdog(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    def call(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["qtdog", *map(str, args)])
        code: object = 0
        try:
            main()
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return Outcome(int(str(code or 0)), captured.out, captured.err)

    return call


@pytest.mark.parametrize(
    ("ending", "begins"), [("md", "**pacs"), ("tex", "% needs"), ("csv", "dataset,"), ("txt", "p")]
)
def test_the_ending_of_the_file_says_how_the_table_is_written(
    qtdog: Callable[..., Outcome], study: Path, tmp_path: Path, ending: str, begins: str
):
    file = tmp_path / f"table.{ending}"
    told = qtdog("table", study, "--select", "last", "-o", file)
    assert (told.code, told.out) == (0, "")
    assert file.read_text().startswith(begins)


def test_columns_are_chosen_and_a_wrong_one_gets_the_nearest(qtdog: Callable[..., Outcome], study: Path):
    shown = qtdog("table", study, "--select", "last", "--columns", "average, file", "--format", "markdown").out
    (head,) = [line for line in shown.splitlines() if line.startswith("| method")]
    assert [name.strip() for name in head.strip("|").split("|")] == ["method", "average", "file"]
    assert "did you mean 'average'" in qtdog("table", study, "--columns", "avrage").err
    assert "has every number" in qtdog("table", study, "--columns", "average", "--format", "csv").err


def test_data_sets_are_not_mixed_unless_asked_to(
    qtdog: Callable[..., Outcome], make_run: Callable[..., Path], tmp_path: Path
):
    make_run(tmp_path / "a", data={"target": "photo"})
    make_run(tmp_path / "b", data={"target": "photo"}, dataset="vlcs")
    told = qtdog("table", tmp_path)
    assert told.code == 1
    assert "pacs (1), vlcs (1)" in told.err
    assert "--per-dataset" in told.err
    told = qtdog("table", tmp_path, "--per-dataset", "--select", "last")
    assert told.code == 0
    assert told.out.count("selection 'last'") == 2
    assert qtdog("report", tmp_path, "-o", tmp_path / "report.html").code == 0
    page = (tmp_path / "report.html").read_text()
    assert 'id="g1-last"' in page


def test_old_and_new_runs_stand_in_one_table(qtdog: Callable[..., Outcome], study: Path, domainbed: Path):
    told = qtdog("table", study, domainbed, "--select", "source")
    assert told.code == 0
    assert "80 % split" in told.out
    assert "\nERM " in told.out
    assert "\nerm + lsq 7 bit " in told.out


def test_a_comparison_says_what_it_compares(qtdog: Callable[..., Outcome], study: Path):
    told = qtdog("table", study, "--compare", "erm + float", "erm + lsq 7 bit", "--select", "source")
    assert told.code == 0
    assert "A = erm + float, B = erm + lsq 7 bit" in told.out
    assert "12" in told.out
    told = qtdog("table", study, "--compare", "erm + float", "EoQ of 3: erm + lsq 7 bit", "--select", "last")
    assert told.code == 1
    assert "no unseen domain, trial and seed in common" in told.err


def test_unfinished_runs_are_left_out_and_named(
    qtdog: Callable[..., Outcome], make_run: Callable[..., Path], tmp_path: Path
):
    make_run(tmp_path / "a", data={"target": "photo"})
    for name in ("b", "prefix-0123", "crew-beginning"):  # the last two are shared steps, no runs
        (make_run(tmp_path / name, data={"target": "sketch"}) / "result.json").unlink()
    told = qtdog("table", tmp_path, "--select", "last")
    assert told.code == 0
    assert "left out, not finished: 1" in told.err
    assert "sketch" not in told.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["table", "nowhere"], "does not exist"),
        (["report", "nowhere"], "does not exist"),
        (["report", "{study}", "--bench", "nowhere.json"], "bench.json"),
        (["report", "{study}", "-o", "{study}"], "is a folder"),
        (["table", "{study}", "--select", "orcle"], "did you mean 'oracle'"),
    ],
)
def test_mistakes_are_named(qtdog: Callable[..., Outcome], study: Path, words: list[str], says: str):
    told = qtdog(*(word.format(study=study) for word in words))
    assert told.code in (1, 2)
    assert says in told.err
    assert "Traceback" not in told.err
