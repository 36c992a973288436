"""Experiment loggers (TensorBoard, Weights & Biases, MLflow), each an extra.

Accelerate's trackers are not used: they cannot drop what an earlier attempt wrote after the checkpoint (TensorBoard),
and find no run by its configuration to go on with (MLflow).
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from qtdog.core.config import Config, config_hash
from qtdog.core.errors import ConfigError, extra
from qtdog.core.progress import CallbackList, RunCallback
from qtdog.core.registry import Registry
from qtdog.runs.record import Record

LOSS_EVERY = 10  # steps between losses that are sent


class Logger(RunCallback, ABC):
    """Sends numbers of one run to a program that shows them; abstract. It never changes a run.

    Args:
        folder: of the run; its name or hash identifies it, so that a resumed run goes on where it was.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def on_start(self, config: Config, step: int) -> None:
        """Open the log of the run of `config`, which goes on after `step` updates.

        Raises:
            ConfigError: the library is not installed; the text names the extra.
        """

    @abstractmethod
    def send(self, step: int, values: dict[str, float]) -> None:
        """Send some numbers that belong to the state after `step` updates."""

    def on_step(self, step: int, loss: float, n_images: int) -> None:
        """Send every tenth training loss."""
        if step % LOSS_EVERY == 0:
            self.send(step, {"train/loss": loss})

    def on_record(self, record: Record) -> None:
        """Send an evaluation: accuracy and loss of sources and unseen domain."""
        self.send(record.seen.step, record_values(record))


LOGGERS: Registry[type[Logger]] = Registry("logger")


def record_values(record: Record) -> dict[str, float]:
    """Return the numbers of an evaluation by name: each domain's, and the sources' means.

    Example:
        >>> from qtdog.runs.record import Score, SourceRecord
        >>> record = Record(SourceRecord(5, True, {"a": Score(0.5, 1.0, 4)}), {"b": Score(0.25, 2.0, 4)}, {}, None)
        >>> record_values(record)
        {'source/accuracy': 0.5, 'source/loss': 1.0, 'unseen/accuracy': 0.25, 'accuracy/a': 0.5, 'accuracy/b': 0.25}
    """
    values = {"source/accuracy": record.seen.source_accuracy, "source/loss": record.seen.source_loss}
    if record.test_accuracy is not None:
        values["unseen/accuracy"] = record.test_accuracy
    scores = record.seen.source | record.test
    return values | {f"accuracy/{domain}": score.accuracy for domain, score in scores.items()}


def run_name(config: Config) -> str:
    """Return what a run is called: method, unseen domain, seed and the hash of its configuration.

    Example:
        >>> run_name(Config()).split("-")[:4]
        ['erm', 'lsq7', 'none', 'seed0']
    """
    quantizer = config.quantizer
    grid = "float" if quantizer.name == "none" else f"{quantizer.name}{quantizer.bits}"
    parts = [config.objective.name, grid, config.data.target, f"seed{config.train.seed}", config_hash(config)]
    return "-".join(parts)


def with_loggers(names: Sequence[str], folder: Path, callback: RunCallback | None = None) -> RunCallback | None:
    """Return the callback of a run: the loggers called `names`, and `callback`.

    Args:
        names: of `LOGGERS`; each counts once.
        folder: of the run.
        callback: what follows the run anyway (a progress bar).

    Raises:
        ConfigError: an unknown name, with the nearest one; when the run begins, a library that is not installed.
    """
    kinds = [LOGGERS[name] for name in dict.fromkeys(names)]
    if not kinds:
        return callback
    return CallbackList([*([callback] if callback else []), *(kind(folder) for kind in kinds)])


EXPERIMENT = "qtdog"
MAX_PARAMETER = 500  # characters that MLflow takes


@LOGGERS.register("mlflow")
class MLflow(Logger):
    """Sends to the experiment `qtdog` of the server in MLFLOW_TRACKING_URI, or a file in the present folder."""

    def on_start(self, config: Config, step: int) -> None:
        """Go on with the run of this configuration if it is resumed, else begin one with its parameters."""
        with extra("mlflow", "--log mlflow needs MLflow", ConfigError):
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        self._client, self._metric, digest = MlflowClient(), Metric, config_hash(config)
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        runs = self._client.search_runs([experiment], f"tags.qtdog_hash = '{digest}'", max_results=1) if step else []
        if runs:
            self._id = runs[0].info.run_id
            return
        tags = {"qtdog_hash": digest, "qtdog_folder": self.folder.name}
        self._id = self._client.create_run(experiment, tags=tags, run_name=run_name(config)).info.run_id
        tree = config.model_dump(mode="json")
        values = {f"{section}.{key}": value for section, part in tree.items() for key, value in part.items()}
        self._client.log_batch(self._id, params=[Param(k, str(v)[:MAX_PARAMETER]) for k, v in values.items()])

    def send(self, step: int, values: dict[str, float]) -> None:
        """Send some numbers."""
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def on_end(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)


@LOGGERS.register("tensorboard")
class TensorBoard(Logger):
    """Writes `tensorboard/` in the run folder: tensorboard --logdir runs."""

    def on_start(self, config: Config, step: int) -> None:
        """Open the event file; what an earlier attempt wrote after `step` is dropped."""
        with extra("tensorboard", "--log tensorboard needs TensorBoard", ConfigError):
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1 if step else None)

    def send(self, step: int, values: dict[str, float]) -> None:
        """Write some numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self) -> None:
        """Close the file."""
        self._writer.close()


@LOGGERS.register("wandb")
class WeightsAndBiases(Logger):
    """Sends to the project `qtdog` (WANDB_PROJECT), or keeps in the run folder with WANDB_MODE=offline."""

    def on_start(self, config: Config, step: int) -> None:
        """Begin or go on with the run of this configuration."""
        with extra("wandb", "--log wandb needs Weights & Biases", ConfigError):
            import wandb
        options = {
            "id": config_hash(config),
            "resume": "allow",
            "dir": self.folder,
            "config": config.model_dump(mode="json"),
        }
        project = os.environ.get("WANDB_PROJECT", "qtdog")
        self._run = wandb.init(project=project, name=run_name(config), settings=wandb.Settings(silent=True), **options)

    def send(self, step: int, values: dict[str, float]) -> None:
        """Send some numbers."""
        self._run.log(values, step=step)

    def on_end(self) -> None:
        """Send what is left."""
        self._run.finish()
