"""TensorBoard: files in the run folder."""

from __future__ import annotations

from pathlib import Path

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, extra
from qtdog.training.loggers.logger import LOGGERS, Logger


@LOGGERS.register("tensorboard")
class TensorBoard(Logger):
    """Writes `tensorboard/` in the run folder: tensorboard --logdir runs."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        with extra("tensorboard", "--log tensorboard needs TensorBoard", ConfigError):
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)

    def send(self, step: int, values: dict[str, float]) -> None:
        """Write some numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
