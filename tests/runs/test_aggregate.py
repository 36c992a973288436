"""Numbers against pandas, what is left out and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qtdog.core.errors import ConfigError, RunError
from qtdog.report.render import render, to_text
from qtdog.report.tables import numbers_csv, summary_table
from qtdog.runs.aggregate import AVERAGE, GAP, SOURCE, WORST, aggregate
from qtdog.runs.find import find_runs
from qtdog.runs.selection import SELECTIONS, apply_selection, check_selections

TARGETS = ("art_painting", "cartoon", "photo", "sketch")


def frame(study: Path, selection: str) -> Any:
    """Read metrics.jsonl with pandas alone and select checkpoints anew: one row per run."""
    chosen = []
    for file in sorted(study.glob("*/metrics.jsonl")):
        lines: Any = pd.DataFrame([json.loads(text) for text in file.read_text().splitlines()])
        method, target, trial = (*file.parent.name.split("-"), "0")[:3]
        lines = lines[lines.selectable & (lines.step > 40)]
        parts = [lines[part].map(lambda one: next(iter(one.values()))["accuracy"]) for part in ("test", "test_in")]
        lines = lines.assign(on_20=(500 * parts[0] - 400 * parts[1]) / 100)
        if selection == "mean":
            found = lines[["source_accuracy", "test_accuracy"]].mean()
        else:
            by = {"source": "source_accuracy", "last": "step", "oracle": "on_20"}[selection]
            found = lines.loc[lines[by].idxmax(), ["source_accuracy", "test_accuracy"]]
        chosen.append({"method": method, "target": target, "trial": trial, **found})
    return pd.DataFrame(chosen)


NAMES = {"float": "erm + float", "lsq": "erm + lsq 7 bit"}


@pytest.mark.parametrize("selection", ["source", "mean", "last", "oracle"])
@pytest.mark.parametrize("method", NAMES)
def test_numbers_are_those_of_pandas(study: Path, selection: str, method: str):
    numbers = aggregate(find_runs([study]).runs, selection)
    row = next(row for row in numbers.rows if row.method == NAMES[method])
    runs = frame(study, selection).query("method == @method")
    runs = runs.assign(gap=runs.source_accuracy - runs.test_accuracy)
    per_trial = runs.groupby("trial")
    expected = {target: group.test_accuracy for target, group in runs.groupby("target")}
    expected |= {AVERAGE: per_trial.test_accuracy.mean(), WORST: per_trial.test_accuracy.min()}
    expected |= {SOURCE: per_trial.source_accuracy.mean(), GAP: per_trial.gap.mean()}
    assert list(expected) == numbers.columns
    for name, values in expected.items():
        got = row.cells[name]
        assert got.n == 3
        assert got.mean == pytest.approx(values.mean(), abs=1e-12)
        assert got.error == pytest.approx(values.std(ddof=0) / np.sqrt(3), abs=1e-12)


def test_a_trial_that_lacks_a_domain_gives_no_average(study: Path):
    numbers = aggregate(find_runs([study]).runs, "last")
    four = next(row for row in numbers.rows if "4 bit" in row.method)
    assert four.cells["cartoon"].n == 1
    assert four.cells["cartoon"].error is None
    assert [four.cells[name].mean for name in ("photo", AVERAGE, WORST, GAP)] == [None] * 4
    text = to_text([summary_table(numbers)])
    line = next(line for line in text.splitlines() if "4 bit" in line)
    assert line.count("–") == 6
    assert "needs every unseen domain of the table" in text


def test_the_best_is_marked_and_the_second_and_equals_are_alike(make_run: Callable[..., Path], tmp_path: Path):
    for name, level in (("a", 0.6), ("b", 0.6), ("c", 0.7), ("d", 0.5)):
        lr = {"a": 1e-4, "b": 2e-4, "c": 3e-4, "d": 4e-4}[name]
        make_run(tmp_path / name, level=level, data={"target": "photo"}, optimizer={"lr": lr})
    numbers = aggregate(find_runs([tmp_path]).runs, "last")
    marks = {row[0].text: [cell.mark for cell in row] for row in summary_table(numbers).rows}
    column = numbers.columns.index("photo") + 1
    assert sorted(found[column] for found in marks.values()) == ["", "best", "second", "second"]
    assert all(not mark for found in marks.values() for i, mark in enumerate(found) if i != column)


def test_settings_that_differ_name_the_rows(make_run: Callable[..., Path], tmp_path: Path):
    for seed in (0, 1):
        make_run(tmp_path / f"log{seed}", data={"target": "photo", "trial": seed}, train={"seed": seed})
    make_run(tmp_path / "raw", data={"target": "photo"}, quantizer={"step_mode": "raw"})
    rows = aggregate(find_runs([tmp_path]).runs, "last").rows
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
    numbers = aggregate(find_runs([tmp_path / name for name in "adcb"]).runs, "last")
    assert [(row.method, row.n_trials) for row in numbers.rows] == [
        ("erm + float", 2),
        ("erm + float (init_seed=3)", 1),
        ("erm + lsq 4 bit", 1),
    ]


def test_of_several_settings_the_best_by_source_is_taken_and_counted(make_run: Callable[..., Path], tmp_path: Path):
    for lr, level in ((1e-4, 0.5), (1e-3, 0.7), (1e-2, 0.6)):
        make_run(tmp_path / f"{lr}", level=level, data={"target": "photo"}, optimizer={"lr": lr})
    runs = find_runs([tmp_path]).runs
    (row,) = aggregate(runs, "source", pooled=True).rows
    best = max(runs, key=lambda run: run.result["source_accuracy"])
    assert row.cells["photo"].mean == best.result["test_accuracy"]
    assert row.n_models == 3


def test_a_run_that_is_there_twice_counts_once(make_run: Callable[..., Path], tmp_path: Path):
    first = make_run(tmp_path / "a", data={"target": "photo"})
    shutil.copytree(first, tmp_path / "b")
    numbers = aggregate(find_runs([tmp_path, first]).runs, "last")
    assert numbers.rows[0].cells["photo"].n == 1
    assert any("Left out: 1" in note for note in numbers.notes)


def test_what_was_shipped_stands_for_its_own_selection(make_run: Callable[..., Path], tmp_path: Path):
    path = make_run(tmp_path / "gptq", data={"target": "photo"}, quantizer={"name": "gptq"})
    result = json.loads((path / "result.json").read_text())
    (path / "result.json").write_text(json.dumps(result | {"test_accuracy": 0.123}))
    (run,) = find_runs([path]).runs
    found = {name: apply_selection(run, name) for name in SELECTIONS}
    assert found["source"] is not None
    assert found["source"].target == 0.123
    # the records are those of the float network, before it was quantized
    assert [found[name] for name in SELECTIONS if name != "source"] == [None] * 4


def test_an_ensemble_of_several_targets_has_an_average(made: dict[str, Any], tmp_path: Path):
    accuracy: dict[tuple[int, str], float] = {}
    for group, seeds in enumerate(((0, 1), (2, 3))):
        for target in TARGETS[:2]:
            members = [
                made["make_run"](tmp_path / f"{target}-{seed}", data={"target": target}, train={"seed": seed})
                # which member comes first must not matter: the best one differs from target to target
                for seed in (seeds if target == TARGETS[0] else reversed(seeds))
            ]
            folder = made["make_ensemble"](tmp_path / f"eoq-{target}-{group}", members)
            accuracy[group, target] = json.loads((folder / "result.json").read_text())["test_accuracy"]
    rows = {row.method: row for row in aggregate(find_runs([tmp_path]).runs, "source").rows}
    row = rows["EoQ of 2: erm + lsq 7 bit"]
    by_group = [np.mean([accuracy[group, target] for target in TARGETS[:2]]) for group in (0, 1)]
    assert row.n_trials == 2
    assert row.cells[AVERAGE].mean == pytest.approx(np.mean(by_group))
    assert row.cells[AVERAGE].error == pytest.approx(np.std(by_group) / 2**0.5)
    assert row.cells[TARGETS[0]].mean == pytest.approx(np.mean([accuracy[group, TARGETS[0]] for group in (0, 1)]))


def test_float_and_quantized_runs_are_selected_from_the_same_window(make_run: Callable[..., Path], tmp_path: Path):
    path = make_run(tmp_path / "float", quantizer={"name": "none"}, data={"target": "sketch"})
    lines = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    early = lines[0]  # step 20 is the best by far, and before 40 % of 100 steps
    for score in (*early["source"].values(), *early["test"].values()):
        score["accuracy"] = 0.99
    early["source_accuracy"] = early["test_accuracy"] = 0.99
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = json.loads((path / "result.json").read_text())
    result |= {"selected_step": 20, "source_accuracy": 0.99, "test_accuracy": 0.99}
    (path / "result.json").write_text(json.dumps(result))
    (run,) = find_runs([path]).runs
    selected = apply_selection(run, "source")
    best = max((line for line in lines if line["step"] > 40), key=lambda line: line["source_accuracy"])
    assert selected is not None
    assert (selected.step, selected.target) == (best["step"], best["test_accuracy"])
    (row,) = aggregate([run], "source").rows
    assert row.cells["sketch"].mean == best["test_accuracy"]


def test_an_ensemble_stands_where_its_members_were_chosen(study: Path):
    (run,) = [run for run in find_runs([study]).runs if run.kind == "ensemble"]
    assert (run.method, run.cost.n_models, run.cost.passes) == ("EoQ of 3: erm + lsq 7 bit", 3, 3)
    assert apply_selection(run, "source") is not None
    assert apply_selection(run, "last") is None


@pytest.mark.parametrize("content", ["{}", "[]", '{"test_mode": "target", "size": 3}', "{"])
def test_a_result_that_no_run_wrote_is_refused_by_name(make_run: Callable[..., Path], tmp_path: Path, content: str):
    path = make_run(tmp_path / "run", data={"target": "photo"})
    (path / "result.json").write_text(content)
    with pytest.raises(RunError, match=str(path)):
        find_runs([tmp_path])


def test_nothing_finished_is_an_error_that_says_so(make_run: Callable[..., Path], tmp_path: Path):
    path = make_run(tmp_path / "run", data={"target": "photo"})
    (path / "result.json").unlink()
    with pytest.raises(RunError, match="1 runs there are not finished"):
        find_runs([tmp_path])


def test_an_unknown_selection_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'oracle'"):
        check_selections(["orakle"])


def test_names_cannot_break_out_of_a_table(make_run: Callable[..., Path], tmp_path: Path):
    hostile = "</script>|<img src=x>\\%&_$\n=x"
    make_run(tmp_path / "run", data={"target": hostile}, dataset=hostile)
    numbers = [aggregate(find_runs([tmp_path]).runs, "last")]
    tables = [summary_table(one) for one in numbers]
    assert "<img" not in render(tables, "markdown")
    rows = [line for line in render(tables, "markdown").splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert len(render(tables, "text").splitlines()) == 7
    tex = render(tables, "latex")
    assert r"\textbackslash{}\%\&\_\$ =x" in tex
    table: Any = pd.read_csv(io.StringIO(numbers_csv(numbers)))
    assert table.dataset[0] == hostile
