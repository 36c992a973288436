"""`qtdog.analyze`: every analysis gives numbers and a figure; runs are called what tells them apart."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import qtdog
from qtdog.api.analyses import Analysis, labels_of
from qtdog.core.errors import ConfigError, RunError
from qtdog.runs.folder import RunFolder

SMALL: dict[str, Any] = {"steps": 4, "batch_size": 4, "image_size": 12, "eval_every": 2, "progress": False}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> qtdog.RunResult:
    found = qtdog.train(target="75", preset="digits", bits=4, out=tmp_path_factory.mktemp("one") / "run", **SMALL)
    assert isinstance(found, qtdog.RunResult)
    return found


@pytest.mark.parametrize(
    ("kind", "options", "column"),
    [
        (
            "flatness",
            {"num_directions": 4, "radii": [3.0], "filter_radii": [], "num_images": 5},
            "increase",
        ),
        ("hessian", {"num_vectors": 10, "num_eigenvalues": 1, "num_probes": 0, "num_images": 1}, "trace"),
        ("surface", {"num_points": 3, "num_images": 5}, "sources"),
        ("noise", {}, "kl"),
        ("errors", {"num_images": 20, "num_mistakes": 2}, "gap"),
        ("cam", {"num_images": 2, "num_shown": 1}, "deletion"),
    ],
)
def test_every_analysis_gives_numbers_and_a_figure(
    result: qtdog.RunResult, tmp_path: Path, kind: str, options: dict[str, Any], column: str
):
    found = getattr(qtdog.analyze, kind)([result], **options, out=tmp_path, progress=False)
    assert found.kind == kind
    assert column in found.numbers[0]
    assert list(found.table().columns) == list(found.numbers[0])
    assert found.plot().width > 200
    assert "data:image/png" in (found._repr_html_() or "")


def test_stability_reads_a_path_and_there_is_no_other_figure(result: qtdog.RunResult, tmp_path: Path):
    found = qtdog.analyze.stability(str(result.folder), out=str(tmp_path))
    assert found.numbers[0]["run"] == "erm + lsq 4 bit"
    assert found.folder == tmp_path / "stability"
    with pytest.raises(RunError, match="there is no figure 9"):
        found.plot(9)


def test_ctrl_c_keeps_what_is_measured(result: qtdog.RunResult, tmp_path: Path):
    asked: list[int] = []

    def interrupting(done: int, total: int) -> None:
        asked.append(done)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        qtdog.analyze.errors(result, num_images=4, out=tmp_path, progress=interrupting)
    asked[:] = [0] * 3
    whole = qtdog.analyze.errors(result, num_images=4, out=tmp_path, progress=interrupting)
    assert whole.numbers[0]["gap"] is not None


def test_a_wrong_role_is_refused(result: qtdog.RunResult):
    with pytest.raises(ConfigError, match="'sources' or 'target', not 'source'"):
        qtdog.analyze.hessian(result, on="source")


FLOAT, DECAY = {"quantizer": {"name": "none"}}, {"optimizer": {"schedule": "linear"}}


@pytest.mark.parametrize(
    ("several", "names"),
    [
        (({}, FLOAT), ["erm + lsq 7 bit", "erm + float"]),
        (({}, {}, DECAY), ["erm + lsq 7 bit (a)", "erm + lsq 7 bit (b)", "erm + lsq 7 bit (schedule=linear)"]),
        (({}, {"train": {"seed": 3}}, FLOAT), ["erm + lsq 7 bit, seed 0", "erm + lsq 7 bit, seed 3", "erm + float"]),
        (({}, {"data": {"target": "0"}}), ["erm + lsq 7 bit, 75 unseen", "erm + lsq 7 bit, 0 unseen"]),
    ],
)
def test_a_run_is_called_what_tells_it_from_the_others(several, names, short_config, tmp_path):
    paths = [tmp_path / letter for letter, _ in zip("abc", several, strict=False)]
    for path, changes in zip(paths, several, strict=True):
        path.mkdir()
        RunFolder(path).claim(short_config(**changes), resume=False)
    assert labels_of(paths) == names


def test_notes_and_numbers_are_text_in_a_notebook(tmp_path: Path):
    hostile = "<script>alert(1)</script>"
    content = {"numbers": [{"run": hostile}], "notes": [hostile], "figures": [], "title": "t", "kind": "noise"}
    shown = Analysis(content, tmp_path)._repr_html_()
    assert shown is not None
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") == 2
