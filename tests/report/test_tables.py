"""Tables: golden files, numbers against pandas, what is left out and what is refused."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qtdog.core.errors import ConfigError, RunError
from qtdog.report.tables import AVERAGE, GAP, SOURCE, WORST, make_block
from qtdog.report.text_tables import body, render
from qtdog.runs.domainbed import read_domainbed
from qtdog.runs.find import find
from qtdog.runs.selection import SELECTIONS, apply_selection, check_selections

HERE = Path(__file__).parent
TARGETS = ("art_painting", "cartoon", "photo", "sketch")


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
    preamble = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "table.tex").write_text(f"{preamble}{fresh[name]}\\end{{document}}\n")
    options = [] if program.endswith("tectonic") else ["-interaction=nonstopmode", "-halt-on-error"]
    told = subprocess.run([program, *options, "table.tex"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-2000:]


def frame(study: Path, selection: str) -> Any:
    """Read metrics.jsonl with pandas alone and choose checkpoints anew: one row per run."""
    chosen = []
    for file in sorted(study.glob("*/metrics.jsonl")):
        lines: Any = pd.DataFrame([json.loads(text) for text in file.read_text().splitlines()])
        method, target, trial = (*file.parent.name.split("-"), "0")[:3]
        lines = lines[lines.selectable]
        if selection == "mean":
            found = lines[lines.step > 40][["source_accuracy", "test_accuracy"]].mean()
        else:
            by = {"source": "source_accuracy", "last": "step", "oracle": "test_accuracy"}[selection]
            found = lines.loc[lines[by].idxmax(), ["source_accuracy", "test_accuracy"]]
        chosen.append({"method": method, "target": target, "trial": trial, **found})
    return pd.DataFrame(chosen)


NAMES = {"float": "erm + float", "lsq": "erm + lsq 7 bit"}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("method", NAMES)
def test_numbers_are_those_of_pandas(study: Path, selection: str, method: str):
    block = make_block(find([study]).entries, selection)
    row = next(row for row in block.rows if row.method == NAMES[method])
    runs = frame(study, selection).query("method == @method")
    runs = runs.assign(gap=runs.source_accuracy - runs.test_accuracy)
    per_trial = runs.groupby("trial")
    expected = {target: group.test_accuracy for target, group in runs.groupby("target")}
    expected |= {AVERAGE: per_trial.test_accuracy.mean(), WORST: per_trial.test_accuracy.min()}
    expected |= {SOURCE: per_trial.source_accuracy.mean(), GAP: per_trial.gap.mean()}
    assert list(expected) == block.columns
    for name, values in expected.items():
        got = row.cells[name]
        assert got.n == 3
        assert got.mean == pytest.approx(values.mean(), abs=1e-12)
        assert got.error == pytest.approx(values.std(ddof=0) / np.sqrt(3), abs=1e-12)


def test_a_trial_that_lacks_a_domain_gives_no_average(study: Path):
    block = make_block(find([study]).entries, "last")
    four = next(row for row in block.rows if "4 bit" in row.method)
    assert four.cells["cartoon"].n == 1
    assert four.cells["cartoon"].error is None
    assert [four.cells[name].mean for name in ("photo", AVERAGE, WORST, GAP)] == [None] * 4
    text = render([block], "text")
    line = next(line for line in text.splitlines() if "4 bit" in line)
    assert line.count("–") == 6
    assert "need a trial with every unseen domain" in text


def test_the_best_is_marked_and_the_second_and_equals_are_alike(make_run: Callable[..., Path], tmp_path: Path):
    for name, level in (("a", 0.6), ("b", 0.6), ("c", 0.7), ("d", 0.5)):
        lr = {"a": 1e-4, "b": 2e-4, "c": 3e-4, "d": 4e-4}[name]
        make_run(tmp_path / name, level=level, data={"target": "photo"}, optimizer={"lr": lr})
    block = make_block(find([tmp_path]).entries, "last")
    marks = {row[0].text: [cell.mark for cell in row] for row in body(block)}
    column = block.columns.index("photo") + 1
    assert sorted(found[column] for found in marks.values()) == ["", "best", "second", "second"]
    assert all(not mark for found in marks.values() for i, mark in enumerate(found) if i != column)


def test_settings_that_differ_name_the_rows(make_run: Callable[..., Path], tmp_path: Path):
    for seed in (0, 1):
        make_run(tmp_path / f"log{seed}", data={"target": "photo", "trial": seed}, train={"seed": seed})
    make_run(tmp_path / "raw", data={"target": "photo"}, quantizer={"step_mode": "raw"})
    rows = make_block(find([tmp_path]).entries, "last").rows
    assert [(row.method, row.n_trials) for row in rows] == [
        ("erm + lsq 7 bit", 2),
        ("erm + lsq 7 bit (step_mode=raw)", 1),
    ]


def test_rows_are_sorted_by_name_whatever_the_folders_are_called(make_run: Callable[..., Path], tmp_path: Path):
    for folder, changes in (
        ("a", {"quantizer": {"bits": 4}}),
        ("b", {"quantizer": {"name": "none"}, "model": {"init_seed": 3}}),  # classifiers that begin alike are a setting
        ("c", {"quantizer": {"name": "none"}}),
        ("d", {"quantizer": {"name": "none"}, "data": {"target": "photo", "trial": 1}}),
    ):
        make_run(tmp_path / folder, **({"data": {"target": "photo"}} | changes))
    block = make_block(find([tmp_path / name for name in "adcb"]).entries, "last")
    assert [(row.method, row.n_trials) for row in block.rows] == [
        ("erm + float", 2),
        ("erm + float (init_seed=3)", 1),
        ("erm + lsq 4 bit", 1),
    ]


def test_of_several_settings_the_best_by_source_is_taken_and_counted(make_run: Callable[..., Path], tmp_path: Path):
    for lr, level in ((1e-4, 0.5), (1e-3, 0.7), (1e-2, 0.6)):
        make_run(tmp_path / f"{lr}", level=level, data={"target": "photo"}, optimizer={"lr": lr})
    entries = find([tmp_path]).entries
    (row,) = make_block(entries, "source", pooled=True).rows
    best = max(entries, key=lambda entry: entry.result["source_accuracy"])
    assert row.cells["photo"].mean == best.result["test_accuracy"]
    assert row.n_models == 3


def test_a_run_that_is_there_twice_counts_once(make_run: Callable[..., Path], tmp_path: Path):
    first = make_run(tmp_path / "a", data={"target": "photo"})
    shutil.copytree(first, tmp_path / "b")
    block = make_block(find([tmp_path, first]).entries, "last")
    assert block.rows[0].cells["photo"].n == 1
    assert any("Left out: 1" in note for note in block.notes)


def test_what_was_shipped_stands_for_its_own_selection(make_run: Callable[..., Path], tmp_path: Path):
    path = make_run(tmp_path / "gptq", data={"target": "photo"}, quantizer={"name": "gptq"})
    result = json.loads((path / "result.json").read_text())
    (path / "result.json").write_text(json.dumps(result | {"test_accuracy": 0.123}))
    (entry,) = find([path]).entries
    found = {name: apply_selection(entry, name) for name in SELECTIONS}
    assert found["source"] is not None
    assert found["source"].target == 0.123
    # the records are those of the float network, before it was quantized
    assert [found[name] for name in ("mean", "last", "oracle")] == [None] * 3


def test_an_ensemble_stands_where_its_members_were_chosen(study: Path):
    (entry,) = [entry for entry in find([study]).entries if entry.kind == "ensemble"]
    assert (entry.method, entry.cost.n_models, entry.cost.passes) == ("EoQ of 3: erm + lsq 7 bit", 3, 3)
    assert apply_selection(entry, "source") is not None
    assert apply_selection(entry, "last") is None


def test_domainbed_is_read_as_its_own_tables_do(domainbed: Path):
    lines = [json.loads(line) for line in domainbed.read_text().splitlines()]
    block = make_block(read_domainbed(domainbed), "source", split="80")
    (row,) = block.rows
    for number, target in enumerate(TARGETS):
        accuracies = []
        for trial in range(2):
            mine = [x for x in lines if x["args"]["test_envs"] == [number] and x["args"]["trial_seed"] == trial]
            sources = [i for i in range(4) if i != number]
            best = max(mine, key=lambda x: np.mean([x[f"env{i}_out_acc"] for i in sources]))
            accuracies.append(best[f"env{number}_in_acc"])
        cell = row.cells[target]
        assert cell.mean == pytest.approx(np.mean(accuracies))
        assert cell.error == pytest.approx(np.std(accuracies) / np.sqrt(2))
    assert row.n_models == 2


def test_the_whole_domain_is_put_together_from_its_two_splits(domainbed: Path):
    entry = read_domainbed(domainbed)[0]
    line = json.loads(domainbed.read_text().splitlines()[0])
    expected = 0.8 * line["env0_in_acc"] + 0.2 * line["env0_out_acc"]
    assert entry.records[0].test_accuracy == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"step": 1}',
        '{"args": {"test_envs": [0]}, "step": 1}',
        '{"args": {"test_envs": [0], "trial_seed": 0, "hparams_seed": 0, "seed": 0, "dataset": "A", "algorithm": "B"},'
        ' "step": 1, "env0_in_acc": 7, "env0_out_acc": 7, "env1_in_acc": 7, "env1_out_acc": 7}',
        '{"args": {"test_envs": [5], "trial_seed": 0, "hparams_seed": 0, "seed": 0, "dataset": "A", "algorithm": "B"},'
        ' "step": 1, "env0_in_acc": 0.7, "env0_out_acc": 0.7, "env1_in_acc": 0.7, "env1_out_acc": 0.7}',
        "[" * 5000,
    ],
)
def test_a_file_that_is_not_domainbeds_is_refused_by_name(line: str, tmp_path: Path):
    file = tmp_path / "results.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(RunError, match="DomainBed"):
        read_domainbed(file)


@pytest.mark.parametrize("content", ["{}", "[]", '{"test_mode": "target", "size": 3}', "{"])
def test_a_result_that_no_run_wrote_is_refused_by_name(make_run: Callable[..., Path], tmp_path: Path, content: str):
    path = make_run(tmp_path / "run", data={"target": "photo"})
    (path / "result.json").write_text(content)
    with pytest.raises(RunError, match=str(path)):
        find([tmp_path])


def test_nothing_finished_is_an_error_that_says_so(make_run: Callable[..., Path], tmp_path: Path):
    path = make_run(tmp_path / "run", data={"target": "photo"})
    (path / "result.json").unlink()
    with pytest.raises(RunError, match="1 runs there are not finished"):
        find([tmp_path])


def test_an_unknown_selection_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'oracle'"):
        check_selections(["orakle"])


def test_names_cannot_break_out_of_a_table(make_run: Callable[..., Path], tmp_path: Path):
    hostile = "</script>|<img src=x>\\%&_$\n=x"
    make_run(tmp_path / "run", data={"target": hostile}, dataset=hostile)
    blocks = [make_block(find([tmp_path]).entries, "last")]
    assert "<img" not in render(blocks, "markdown")
    rows = [line for line in render(blocks, "markdown").splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert len(render(blocks, "text").splitlines()) == 7
    tex = render(blocks, "latex")
    assert r"\textbackslash{}\%\&\_\$ =x" in tex
    table: Any = pd.read_csv(io.StringIO(render(blocks, "csv")))
    assert table.dataset[0] == hostile
