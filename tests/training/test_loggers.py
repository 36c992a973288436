"""Loggers get the numbers of a run, and a run is the same with them."""

from __future__ import annotations

import json
import sys

import pytest

from qtdog.core.errors import ConfigError
from qtdog.core.progress import CallbackList
from qtdog.runs.folder import RunFolder
from qtdog.training.loggers import LOGGERS, Logger, with_loggers
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run


class Kept(Logger):
    """A logger that keeps what it gets."""

    sent: dict[str, dict[int, float]]
    closed = 0

    def on_start(self, config, step):
        type(self).sent = {}

    def send(self, step, values):
        for name, value in values.items():
            self.sent.setdefault(name, {})[step] = value

    def on_end(self):
        type(self).closed += 1


@pytest.fixture
def config(short_config, three_digits):
    return resolve(short_config(train={"steps": 20, "eval_every": 10}), three_digits)


def test_a_logger_gets_losses_and_evaluations_and_changes_nothing(config, three_digits, tmp_path):
    logged, plain = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    result = run(config, three_digits, logged, callbacks=RunCallbacks(CallbackList([Kept(logged.path)])))
    assert result["model_sha256"] == run(config, three_digits, plain)["model_sha256"]
    assert Kept.closed == 1
    assert list(Kept.sent["train/loss"]) == [10, 20]
    for record in logged.read_metrics():
        assert Kept.sent["source/accuracy"][record.seen.step] == record.seen.source_accuracy
        assert Kept.sent["unseen/accuracy"][record.seen.step] == record.test_accuracy
        assert Kept.sent["accuracy/15"][record.seen.step] == record.seen.source["15"].accuracy


def test_tensorboard_files_hold_the_numbers(config, three_digits, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(tmp_path / "run")
    run(config, three_digits, folder, callbacks=RunCallbacks(with_loggers(["tensorboard"], folder.path)))
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("unseen/accuracy")}
    assert found == pytest.approx({record.seen.step: record.test_accuracy for record in folder.read_metrics()})


def test_mlflow_keeps_the_numbers_and_goes_on_with_a_resumed_run(config, three_digits, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    for step in (0, 4):
        logger = LOGGERS["mlflow"](tmp_path)
        logger.on_start(config, step)
        logger.send(step, {"a": 1.0 + step})
        logger.on_end()
    client = MlflowClient()
    experiment = client.get_experiment_by_name("qtdog")
    assert experiment is not None
    (kept,) = client.search_runs([experiment.experiment_id])
    assert [(one.step, one.value) for one in client.get_metric_history(kept.info.run_id, "a")] == [(0, 1.0), (4, 5.0)]
    assert kept.data.params["quantizer.bits"] == "7"


def test_wandb_offline_keeps_a_folder(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = LOGGERS["wandb"](tmp_path)
    logger.on_start(config, 0)
    logger.send(1, {"a": 1.0})
    logger.on_end()


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_without_its_library_a_logger_names_the_extra(name, module, config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'qtdog\[{name}\]'"):
        LOGGERS[name](tmp_path).on_start(config, 0)


def test_an_unknown_logger_is_told_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="unknown logger 'tensorbord'; did you mean 'tensorboard'"):
        with_loggers(["tensorbord"], tmp_path)
    assert json.dumps(list(LOGGERS)) == '["mlflow", "tensorboard", "wandb"]'
