"""Weights & Biases."""

from __future__ import annotations

import os
from pathlib import Path

from qtdog.core.config import Config, config_hash
from qtdog.core.errors import ConfigError, extra
from qtdog.training.loggers.logger import LOGGERS, Logger, run_name


@LOGGERS.register("wandb")
class WeightsAndBiases(Logger):
    """Sends to the project `qtdog` (WANDB_PROJECT), or keeps in the run folder with WANDB_MODE=offline."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        with extra("wandb", "--log wandb needs Weights & Biases", ConfigError):
            import wandb
        how = {"id": config_hash(config), "resume": "allow", "dir": folder, "config": config.model_dump(mode="json")}
        project = os.environ.get("WANDB_PROJECT", "qtdog")
        self._run = wandb.init(project=project, name=run_name(config), settings=wandb.Settings(silent=True), **how)

    def send(self, step: int, values: dict[str, float]) -> None:
        """Send some numbers."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
