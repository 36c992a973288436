"""The notebook and the script under `examples/` run; the script is a plug-in of commands and studies too."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import qtdog
from qtdog.cli.main import main
from qtdog.runs.folder import RunFolder
from qtdog.sweep.clusters import RayEngine
from qtdog.sweep.plan import Plan, make_plan
from qtdog.sweep.runner import Driver
from qtdog.sweep.study import read_study
from qtdog.training.plugins import forget_plugins

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "first_steps.ipynb"
OWN = EXAMPLES / "own_methods.py"
STUDY = EXAMPLES / "own_study.yaml"


def run_cell(source: str, namespace: dict[str, Any]) -> Any:
    """Run a cell as a notebook does, and return the value of its last expression."""
    tree = ast.parse(source)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "cell", "exec"), namespace)
        return None
    tree.body.pop()
    exec(compile(tree, "cell", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


@pytest.mark.usefixtures("one_registry")
def test_the_notebook_trains_plots_predicts_exports_and_compares_in_ten_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 10
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    namespace: dict[str, Any] = {}
    shown = [run_cell(cell.replace("STEPS = 300", "STEPS = 4"), namespace) for cell in cells]
    kinds = [type(value).__name__ for value in shown]
    assert kinds[1:8] == ["RunResult", "DataFrame", "Figure", "DataFrame", "Image", "TrainedModel", "ImagePredictions"]
    assert shown[-1] == 1.0  # the export answers as the model does
    assert (tmp_path / "model.onnx").stat().st_size > 1000


@pytest.fixture
def no_plugins() -> Any:
    forget_plugins()
    yield
    forget_plugins()


def test_the_script_trains_its_own_objective_backbone_and_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_plugins: None
):
    monkeypatch.setattr(sys, "argv", ["own_methods.py", "--steps", "2", "--output", str(tmp_path)])
    runpy.run_path(str(OWN), run_name="__main__")
    shown = capsys.readouterr().out
    assert "worst-domain + lsq 7 bit, unseen domain dark" in shown
    assert "erm + lsq 7 bit" in shown.partition("dataset")[2]
    config = RunFolder(tmp_path / "worst-domain").read_config()
    assert config is not None
    assert len(config.plugins.sha256) == 3  # an objective, a backbone and a data set


def test_the_script_is_a_plugin_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plugins: None):
    words = ["--data", "tinted", "--target", "dark", "--objective", "worst-domain", "--backbone", "patches"]
    words += ["--weights", "none", "--image-size", "32", "--batch-size", "2", "--steps", "2", "--json"]
    given = ["qtdog", "train", "--plugin", str(OWN), *words, "-o", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    result = qtdog.RunResult.read(tmp_path / "run")
    assert result.target == "dark"
    assert result.config.plugins.files == (str(OWN),)
    assert result.result["dataset"] == "tinted"


def tiny_plan(folder: Path) -> Plan:
    """Return the plan of the example's study, shortened to one run of two steps for each method."""
    text = STUDY.read_text().replace("[own_methods.py]", f"[{OWN}]").replace("train.steps: 200", "train.steps: 2")
    text = text.replace("target: [dark, bright]", "target: [dark]").replace("seed: [0, 1]", "seed: [0]")
    (folder / "study.yaml").write_text(text.replace("data.batch_size: 8", "data.batch_size: 2"))
    return make_plan(read_study(folder / "study.yaml"))


def model_hashes(plan: Plan, folder: Path) -> list[str]:
    found = [RunFolder(folder / task.name).read_result() for task in plan.tasks]
    return [one["model_sha256"] if one else "missing" for one in found]


class Quiet:
    """Says nothing of a sweep but what failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def show(self, progress: Any) -> None:
        """Say nothing."""

    def ended(self, task: Any, outcome: Any) -> None:
        """Keep why a task failed."""
        if outcome.status != "done":
            self.failed.append(outcome.reason)


def local_hashes(folder: Path) -> tuple[Plan, list[str]]:
    plan = tiny_plan(folder)
    study = qtdog.sweep(folder / "study.yaml", out=folder / "local", workers=1, threads=1, progress=False)
    assert [row["method"] for row in study.rows(reference="erm")] == ["erm", "worst-domain"]
    return plan, model_hashes(plan, folder / "local")


@pytest.mark.stress
def test_a_study_of_the_plugin_runs_with_local_workers(tmp_path: Path, no_plugins: None):
    _, local = local_hashes(tmp_path)
    assert "missing" not in local
    assert len(set(local)) == 2


@pytest.mark.stress
def test_a_study_of_the_plugin_gives_the_same_with_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plugins: None
):
    plan, local = local_hashes(tmp_path)
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = Quiet()
    engine = RayEngine(tmp_path / "ray", plan.source, workers=1, threads=1)
    Driver(plan.tasks, tmp_path / "ray", engine, quiet).run()
    assert quiet.failed == []
    assert model_hashes(plan, tmp_path / "ray") == local
