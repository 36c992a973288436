"""DomainBed's results.jsonl: its own numbers, and files that are damaged, of another program, or none of its files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtdog.core.errors import RunError
from qtdog.runs.aggregate import AVERAGE, aggregate
from qtdog.runs.domainbed import INCOMPLETE, SWAD, read_domainbed
from qtdog.runs.find import find_runs
from qtdog.runs.selection import apply_selection

TARGETS = ("art_painting", "cartoon", "photo", "sketch")
ROOT = Path(__file__).parents[2]
SWEEPS = [
    *([Path(os.environ["QTDOG_DATA"]) / "domainbed_sweep"] if os.environ.get("QTDOG_DATA") else []),
    ROOT.parent / "shared" / "data" / "domainbed_sweep",
    ROOT.parents[1] / "shared" / "data" / "domainbed_sweep",
]


@pytest.fixture(scope="module")
def sweep() -> Path:
    """The 200 records of VLCS that DomainBed's own tests use."""
    for folder in SWEEPS:
        if folder.is_dir():
            return folder
    pytest.skip("DomainBed's test sweep is not there: set QTDOG_DATA to the folder that holds domainbed_sweep")


# what DomainBed's `collect_results` prints for C, L, S, V and their average
PRINTED = {
    "source": ("97.968198", "64.235294", "74.067022", "77.101074", "78.342897"),
    "oracle": ("96.91", "65.86", "71.65", "76.90", "77.83"),
    "leave-one-out": ("96.91", "64.45", "70.51", "76.69", "77.14"),
}


@pytest.mark.parametrize("selection", PRINTED)
def test_its_own_tables_come_out_to_the_printed_digits(sweep: Path, selection: str):
    (row,) = aggregate(find_runs([sweep]).runs, selection, split="80").rows
    cells = [row.cells[name] for name in ("Caltech101", "LabelMe", "SUN09", "VOC2007", AVERAGE)]
    for cell, printed in zip(cells, PRINTED[selection], strict=True):
        assert f"{100 * (cell.mean or 0):.{len(printed.partition('.')[2])}f}" == printed
    if selection == "source":
        assert f"{100 * (cells[-1].error or 0):.6f}" == "0.006330"


def test_domainbed_is_read_as_its_own_tables_do(domainbed: Path):
    lines = [json.loads(line) for line in domainbed.read_text().splitlines()]
    numbers = aggregate(read_domainbed(domainbed).runs, "source", split="80")
    (row,) = numbers.rows
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
    run = read_domainbed(domainbed).runs[0]
    line = json.loads(domainbed.read_text().splitlines()[0])
    expected = 0.8 * line["env0_in_acc"] + 0.2 * line["env0_out_acc"]
    assert run.records[0].test_accuracy == pytest.approx(expected, abs=1e-12)


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


def lines_of(domainbed: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in domainbed.read_text().splitlines()]


def test_a_last_line_that_was_cut_off_and_blank_lines_are_passed_over_and_counted(domainbed: Path, tmp_path: Path):
    file = tmp_path / "results.jsonl"
    whole = domainbed.read_text()
    file.write_text(whole.replace("\n", "\n\n", 2) + whole.splitlines()[0][:70])
    found, expected = read_domainbed(file), read_domainbed(domainbed)
    assert found.left_out[INCOMPLETE] == 3
    assert [run.records for run in found.runs] == [run.records for run in expected.runs]
    file.write_text("{\n" + whole)
    with pytest.raises(RunError, match="line 1"):
        read_domainbed(file)


def test_unlabeled_images_count_in_the_whole_domain(domainbed: Path, tmp_path: Path):
    line = lines_of(domainbed)[0]
    line["args"]["uda_holdout_fraction"] = 0.5
    line |= {f"env{i}_uda_acc": 0.9 for i in range(4)}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    (run,) = read_domainbed(tmp_path / "results.jsonl").runs
    expected = 0.2 * line["env0_out_acc"] + 0.8 * (0.5 * line["env0_in_acc"] + 0.5 * 0.9)
    assert run.records[0].test_accuracy == pytest.approx(expected, abs=1e-12)


def swad_lines(domainbed: Path, swad: str) -> list[dict[str, Any]]:
    """Return lines as the code of SWAD and MIRO writes them."""
    lines = []
    for line in lines_of(domainbed)[:3]:
        args = {key: value for key, value in line["args"].items() if key != "hparams_seed"}
        args |= {"real_test_envs": line["args"]["test_envs"], "test_envs": [[0], [1], [2], [3]]}
        accuracies = {key.removesuffix("_acc"): value for key, value in line.items() if key.startswith("env")}
        lines.append({"args": args, "hparams": {"swad": swad}, "step": line["step"], "loss": 1.0} | accuracies)
    return lines


def test_lines_of_swads_and_miros_code_are_told_apart_by_name(domainbed: Path, tmp_path: Path):
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in swad_lines(domainbed, "")))
    (run,) = read_domainbed(file).runs
    first = read_domainbed(domainbed).runs[0]
    assert (run.target, run.records) == (first.target, first.records)
    file.write_text("".join(json.dumps(line) + "\n" for line in swad_lines(domainbed, "LossValley")))
    found = read_domainbed(file)
    assert (found.runs, found.left_out[SWAD]) == ([], 3)


def test_its_oracle_takes_the_last_evaluation(domainbed: Path):
    for run in read_domainbed(domainbed).runs:
        selected = apply_selection(run, "oracle")
        assert selected is not None
        assert selected.step == 200
        assert selected.score == run.target_20[200]
