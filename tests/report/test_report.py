"""The report and the commands: what goes in safely, what is refused, what it says of real runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qtdog.core.config import Config
from qtdog.core.errors import RunError
from qtdog.data.known_datasets import RotatedDigits
from qtdog.report.charts import curves_chart, risk_chart
from qtdog.report.html import PageOptions, asset, build_page, json_for_html, mistakes_table
from qtdog.report.inputs import find_analyses, latencies, read_bench
from qtdog.runs.find import find_runs
from qtdog.runs.finished import FinishedRun, class_counts, risk_points
from qtdog.runs.folder import RunFolder
from qtdog.runs.selection import apply_selection
from qtdog.runs.statistics import share_interval
from qtdog.training.protocol import resolve
from qtdog.training.run import run

HOSTILE = ["</script>", "<!--", "]]>", "&lt;", "\u2028", "'\"`"]


@pytest.fixture(scope="module")
def entries(study: Path) -> list[FinishedRun]:
    return find_runs([study]).runs


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_ends_the_element_that_holds_the_data(text: str):
    made = json_for_html({text: [text]})
    assert not set(made) & set("<>&\u2028")
    assert json.loads(made) == {text: [text]}


def colors(scheme: str) -> dict[str, str]:
    blocks = re.findall(r":root(?:\[data-scheme=\"dark\"\])? \{(.*?)\}", asset("style.css"), re.DOTALL)
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[0]))
    return light if scheme == "light" else light | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[1]))


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_dark_page_is_the_same_whether_the_reader_or_the_system_chose_it():
    by_system, chosen = re.findall(
        r":root(?::not[^{]*|\[data-scheme=\"dark\"\]) \{(.*?)\}", asset("style.css"), re.DOTALL
    )
    assert by_system.split() == chosen.split()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_page(scheme: str):
    found = colors(scheme)
    for behind in ("bg", "soft"):
        for name, least in {"text": 7, "dim": 4.5, "accent": 4.5, **{f"c{i}": 3 for i in range(10)}}.items():
            low, high = sorted((luminance(found[name]), luminance(found[behind])))
            assert (high + 0.05) / (low + 0.05) >= least, (name, behind)


def test_what_is_recomputed_is_what_the_run_wrote(short_config: Callable[..., Config], tmp_path: Path):
    digits = RotatedDigits()
    config = resolve(short_config(data={"target": "75", "batch_size": 8, "image_size": 12}), digits)
    result = run(config, digits, RunFolder(tmp_path / "run"))
    (entry,) = find_runs([tmp_path]).runs
    for selection, told in result["by_selection"].items():
        found = apply_selection(entry, selection)
        assert found is not None
        assert (found.step, found.source, found.target) == tuple(told.values())
        assert found.target_80 is not None
    after = [record for record in entry.records if record.seen.step > 2]
    mean = apply_selection(entry, "mean")
    assert mean is not None
    assert mean.target == pytest.approx(sum(record.test_accuracy or 0 for record in after) / len(after))
    page = build_page(find_runs([tmp_path]), PageOptions(tmp_path / "report.html"))
    assert 'href="run/result.json"' in page


def test_the_page_fetches_nothing_and_names_its_own_scripts_only(study: Path, tmp_path: Path):
    page = build_page(find_runs([study]), PageOptions(tmp_path / "report.html"))
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "default-src 'none'" in page
    assert "unsafe" not in page


@pytest.mark.parametrize(
    "told", [{}, [], {"kind": "x"}, {"figures": ["../secret.png"], "data": [], "kind": "x", "title": "x"}]
)
def test_what_no_analysis_wrote_is_refused_by_name(told: Any, tmp_path: Path):
    (tmp_path / "analysis.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match=re.escape(str(tmp_path))):
        find_analyses([tmp_path])


def bench_file(path: Path, p50_s: Any, file: str) -> Path:
    rows = [{"path": file, "runtime": "ort", "timing": {"p50_s": p50_s}}]
    path.write_text(json.dumps({"rows": rows, "batch": 1, "threads": 1, "machine": {"cpu": "a"}}))
    return path


def test_a_latency_belongs_to_the_run_whose_folder_it_lies_in(entries: list[FinishedRun], tmp_path: Path):
    mine = entries[0]
    rows = {"mine": [mine], "other": [entries[-1]]}
    inside = read_bench(bench_file(tmp_path / "a.json", 0.004, str(mine.path / "onnx" / "model.onnx")))
    outside = read_bench(bench_file(tmp_path / "b.json", 0.004, str(tmp_path / "model.onnx")))
    assert {label: one.p50_ms for label, one in latencies(rows, inside).items()} == {"mine": 4.0}
    assert latencies(rows, outside) == {}


@pytest.mark.parametrize("p50_s", [0, -1, "x", None, float("nan")])
def test_what_is_no_latency_is_refused(p50_s: Any, tmp_path: Path):
    with pytest.raises(RunError, match="no file of 'qtdog bench'"):
        read_bench(bench_file(tmp_path / "a.json", p50_s, "x"))


def test_the_worst_classes_are_counted_over_all_trials(entries: list[FinishedRun]):
    rows = {"lsq": [run for run in entries if run.kind == "run" and run.target == "photo"]}
    counts = class_counts(rows["lsq"])
    assert counts.keys() == {("photo", "dog"), ("photo", "horse")}
    assert sum(counts["photo", "dog"].values()) == 300 * len(rows["lsq"])
    table = mistakes_table(rows, "t")

    def upper(key: tuple[str, str]) -> float:
        n = sum(counts[key].values())
        return share_interval(counts[key][key[1]] / n, n)[1]

    worst = min(counts, key=upper)
    assert [cell.text for cell in table.rows[0]][:3] == ["lsq", *worst]
    right, n = counts[worst][worst[1]], sum(counts[worst].values())
    assert table.rows[0][5].text == f"{right:,} of {n:,}"
    other = "horse" if worst[1] == "dog" else "dog"
    assert table.rows[0][6].text == f"{other} ({n - right:,})"


@pytest.mark.parametrize("told", [None, [], "x", {"test": 3}, {"test": {"a": [3, {"class": "b"}, {"right": "x"}]}}])
def test_what_a_result_says_wrongly_of_classes_and_errors_is_passed_over(entries: list[FinishedRun], told: Any):
    run = replace(entries[0], result={"classes": told, "calibration": told})
    assert class_counts([run]) == {}
    assert risk_points(run, "test") == {}


def test_errors_that_are_left_are_means_over_trials_and_end_at_the_error(entries: list[FinishedRun]):
    runs = [run for run in entries if run.kind == "run" and run.target == "photo" and run.method.endswith("7 bit")]
    chart = risk_chart({"lsq": runs})
    (panel,) = chart["panels"]
    (series,) = panel["series"]
    errors = [100 * (1 - run.saved.target) for run in runs if run.saved and run.saved.target is not None]
    assert len(errors) == len(runs) > 1
    mean = sum(errors) / len(errors)
    assert series["points"][-1] == pytest.approx([100, mean, min(errors), max(errors), len(runs)], abs=0.01)


def test_an_ensemble_is_one_point_at_the_last_step_of_the_others(entries: list[FinishedRun]):
    ensemble = next(run for run in entries if run.kind == "ensemble")
    runs = [run for run in entries if run.kind == "run" and run.target == ensemble.target]
    panels = {panel["title"]: panel for panel in curves_chart({"lsq": runs, "EoQ": [ensemble]})["panels"]}
    points = {one["part"]: one["points"] for one in panels[ensemble.target]["series"] if one["name"] == "EoQ"}
    assert ensemble.saved is not None
    assert ensemble.saved.target is not None
    accuracy = 100 * ensemble.saved.target
    assert points["target"][0] == pytest.approx([100, accuracy, accuracy, accuracy, 1], abs=1e-3)
