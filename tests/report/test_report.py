"""The report and the commands: what goes in safely, what is refused, what it says of real runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtdog.core.config import Config
from qtdog.core.errors import RunError
from qtdog.data.digits import RotatedDigits
from qtdog.report.html import PageOptions, asset, build_page, json_for_html
from qtdog.report.inputs import find_analyses, latencies, read_bench
from qtdog.runs.find import find_runs
from qtdog.runs.finished import FinishedRun
from qtdog.runs.folder import RunFolder
from qtdog.runs.selection import apply_selection
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


def colours(scheme: str) -> dict[str, str]:
    blocks = re.findall(r":root \{(.*?)\}", asset("style.css"), re.DOTALL)
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[0]))
    return light if scheme == "light" else light | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[1]))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_page(scheme: str):
    found = colours(scheme)
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
