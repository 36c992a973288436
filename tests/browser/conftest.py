"""A report of a hundred runs, and Chromium to look at it."""

from __future__ import annotations

import json
import runpy
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qtdog.report.html import PageOptions, build_page
from qtdog.report.inputs import find_analyses, read_bench
from qtdog.runs.find import find_runs

MADE = runpy.run_path(str(Path(__file__).parents[1] / "report" / "made_runs.py"))
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SECRET = b"a secret of this machine"
HOSTILE = "</script><img src=x onerror=alert(1)>"
PIXEL = (  # the smallest PNG
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0:~\x9bU\0\0\0\nIDATx\x9cc`\0\0\0\x02\0\x01H\xaf\xa4q"
    b"\0\0\0\0IEND\xaeB`\x82"
)


class Made(NamedTuple):
    """A report, and what it took."""

    file: Path
    n_runs: int
    seconds: float
    pixel: bytes = PIXEL  # the only picture that it may show
    secret: bytes = PIXEL + SECRET


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Write the report of 100 runs: 8 methods on 4 domains in 3 trials, 3 with hostile names, and an ensemble."""
    root = tmp_path_factory.mktemp("report")
    runs = root / "runs"
    settings = [{"name": "none"}, *({"bits": bits} for bits in (3, 4, 5, 6, 7, 8)), {"step_mode": "raw"}]
    for m, quantizer in enumerate(settings):
        for target in MADE["DOMAINS"]:
            for trial in range(3):
                problem = {"data": {"target": target, "trial": trial}, "train": {"seed": trial}}
                MADE["make_run"](runs / f"{m}-{target}-{trial}", level=0.5 + m / 100, quantizer=quantizer, **problem)
    for target in MADE["DOMAINS"][:3]:
        path = runs / f"{target} <img src=x onerror=alert(2)>"
        # what a configuration says freely: here the backbone, which names the row as it differs
        MADE["make_run"](path, data={"target": target}, quantizer={"name": "none"}, model={"backbone": HOSTILE})
    MADE["make_ensemble"](runs / "eoq", [runs / f"5-photo-{trial}" for trial in range(3)])
    write_analysis(root / "analysis")
    (root / "secret.png").write_bytes(PIXEL + SECRET)  # a picture beside what was received
    write_analysis(root / "linked")
    (root / "linked" / "flatness.png").unlink()
    (root / "linked" / "flatness.png").symlink_to(root / "secret.png")
    write_analysis(root / "above", figure="../secret.png")
    times = [
        {"path": str(runs / f"{m}-photo-0" / "model.onnx"), "runtime": "ort", "timing": {"p50_s": 0.003 + m / 1000}}
        for m in range(5)
    ]
    bench = {"rows": times, "batch": 1, "threads": 2, "machine": {"cpu": HOSTILE}}
    (root / "bench.json").write_text(json.dumps(bench))
    started = time.process_time()
    found, damaged = find_runs([runs]), list[str]()
    options = PageOptions(
        out=root / "report.html",
        analyses=find_analyses([root], damaged),
        bench=read_bench(root / "bench.json"),
        title=HOSTILE,
    )
    assert len(damaged) == 2
    (root / "report.html").write_text(build_page(found, options))
    return Made(root / "report.html", len(found.runs), time.process_time() - started)


def write_analysis(folder: Path, figure: str = "flatness.png") -> None:
    """Write an analysis as `qtdog analyze` does, with a hostile title."""
    folder.mkdir()
    told: dict[str, Any] = {"kind": "flatness", "title": HOSTILE, "runs": [{"label": HOSTILE}], "notes": [HOSTILE]}
    numbers = [{"run": HOSTILE, "gamma": 1.0, "flatness": None}]
    told |= {"numbers": numbers, "figures": [figure, "flatness.pdf"], "data": ["flatness.csv"]}
    (folder / "analysis.json").write_text(json.dumps(told))
    (folder / "flatness.png").write_bytes(PIXEL)
    (folder / "flatness.csv").write_text("run\n")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, or a skip that says what is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()
