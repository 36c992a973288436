"""Reading run folders: what is finished, what is damaged, what studies call a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtdog.core.errors import ConfigError, RunError
from qtdog.core.files import sha256_file
from qtdog.runs.aggregate import aggregate
from qtdog.runs.find import find_runs, open_run, require_run


def finished(path: Path) -> Path:
    """Give a made-up run a model file, as a finished one has."""
    (path / "model.safetensors").write_bytes(b"weights")
    result = json.loads((path / "result.json").read_text())
    result["model_sha256"] = sha256_file(path / "model.safetensors")
    (path / "result.json").write_text(json.dumps(result))
    return path


def test_a_finished_run_is_opened_with_its_model(make_run: Callable[..., Path], tmp_path: Path):
    path = finished(make_run(tmp_path / "run", train={"seed": 3}))
    run = require_run(path)
    assert (run.folder.path, run.config.train.seed) == (path, 3)
    assert run.model_sha256 == sha256_file(path / "model.safetensors")
    assert run.result["selected_step"] == json.loads((path / "result.json").read_text())["selected_step"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", "other weights", "is not the file that the run wrote"),
        ("result.json", "[]", "does not hold what a finished run writes"),
        ("result.json", "{}", "does not hold what a finished run writes"),
        ("result.json", "{", "is not valid JSON"),
        ("config.yaml", "quantizer: {bitz: 7}", "cannot be read"),
        ("config.yaml", "[1]", "cannot be read"),
    ],
)
def test_a_damaged_run_is_an_error_that_names_the_file(
    name: str, content: str, message: str, make_run: Callable[..., Path], tmp_path: Path
):
    path = finished(make_run(tmp_path / "run"))
    (path / name).write_text(content)
    with pytest.raises(RunError, match=message):
        require_run(path)


def test_what_is_no_finished_run_is_told_apart(made: dict[str, Any], tmp_path: Path):
    with pytest.raises(RunError, match="is no folder"):
        require_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"is no run folder \(it has no config\.yaml\)"):
        open_run(tmp_path)
    members = [made["make_run"](tmp_path / str(seed), train={"seed": seed}) for seed in (0, 1)]
    with pytest.raises(RunError, match="is not finished"):  # without a model file
        require_run(members[0])
    with pytest.raises(ConfigError, match="holds an ensemble"):
        require_run(made["make_ensemble"](tmp_path / "eoq", members))


def test_a_study_over_several_targets_names_one_row_per_method(make_run: Callable[..., Path], tmp_path: Path):
    labels = {}
    for target in ("cartoon", "sketch"):
        for bits in (7, 4):
            make_run(tmp_path / f"{bits}-{target}", data={"target": target}, quantizer={"bits": bits})
            own = {"method": "ours", "target": target, "trial, seed": 0, "quantizer.bits": bits}
            labels[f"{bits}-{target}"] = [own] if bits == 7 else [own, {"method": "few bits", "target": target}]
    state = tmp_path / ".sweep" / "studies"
    state.mkdir(parents=True)
    (state / "mine.json").write_text(json.dumps(labels))
    runs = find_runs([tmp_path])
    assert {run.path.name: run.names for run in runs.runs} == {
        "7-cartoon": ("ours bits=7",),
        "7-sketch": ("ours bits=7",),
        "4-cartoon": ("ours bits=4", "few bits"),
        "4-sketch": ("ours bits=4", "few bits"),
    }
    rows = aggregate(runs.runs, "source").rows
    assert {row.method: row.n_trials for row in rows} == {"ours bits=7": 1, "ours bits=4": 1, "few bits": 1}
    assert all({"cartoon", "sketch", "average"} <= row.cells.keys() for row in rows)
