"""MLflow."""

from __future__ import annotations

import time
from pathlib import Path

from qtdog.core.config import Config, config_hash
from qtdog.core.errors import ConfigError, extra
from qtdog.training.loggers.logger import LOGGERS, Logger, run_name

EXPERIMENT = "qtdog"
MAX_PARAMETER = 500  # characters that MLflow takes


@LOGGERS.register("mlflow")
class MLflow(Logger):
    """Sends to the experiment `qtdog` of the server in MLFLOW_TRACKING_URI, or a file in the present folder."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
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
        tags = {"qtdog_hash": digest, "qtdog_folder": folder.name}
        self._id = self._client.create_run(experiment, tags=tags, run_name=run_name(config)).info.run_id
        tree = config.model_dump(mode="json")
        values = {f"{section}.{key}": value for section, part in tree.items() for key, value in part.items()}
        self._client.log_batch(self._id, params=[Param(k, str(v)[:MAX_PARAMETER]) for k, v in values.items()])

    def send(self, step: int, values: dict[str, float]) -> None:
        """Send some numbers."""
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)
