"""The latent weights behind a shipped file, from the last checkpoint of its run."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qtdog.core.config import Config
from qtdog.core.errors import RunError
from qtdog.runs.folder import RunFolder
from qtdog.training.build import AVERAGERS
from qtdog.training.checkpoint import Checkpoint, checkpoint_folders, read_checkpoint


def latent_weights(folder: RunFolder, config: Config) -> dict[str, Tensor]:
    """Return the weights before rounding by the names of the plain network: of the selected checkpoint, or the average.

    Args:
        folder: of a finished run.
        config: its configuration.

    Raises:
        RunError: the run kept no checkpoint, or none with the weights that were shipped.
        FormatError: the checkpoint is broken.
    """
    kept = checkpoint_folders(folder.checkpoints)
    if not kept:
        text = f"{folder.path} has no checkpoint, and only there are the weights before rounding"
        raise RunError(f"{text}. Copy the run with its checkpoint/ folder, or train it again.")
    state = shipped_state(kept[-1], config)
    return {plain_name(name): value for name, value in state.items()}


def shipped_state(place: Path, config: Config) -> dict[str, Tensor]:
    """Return the state, with quantizers, that the shipped file was made of.

    Raises:
        RunError: the checkpoint holds no selected state.
        FormatError: the checkpoint is broken.
    """
    checkpoint = read_checkpoint(place)
    averaged = _average(checkpoint, config)
    if averaged is not None:
        return checkpoint.tensors["network"] | averaged
    if "selected" not in checkpoint.tensors:
        raise RunError(f"{place} holds no selected weights: the run has not come to its end")
    return checkpoint.tensors["selected"]


def _average(checkpoint: Checkpoint, config: Config) -> dict[str, Tensor] | None:
    averager = AVERAGERS[config.averager.name](config.averager.params, config.start_step or 0)
    averager.restore(checkpoint.tensors["averager"], checkpoint.state["averager"])
    return averager.final()


def plain_name(name: str) -> str:
    """Return the name that a latent weight has without quantizers; any other name as it is.

    Example:
        >>> plain_name("featurizer.conv.parametrizations.weight.original")
        'featurizer.conv.weight'
    """
    head, found, tail = name.rpartition("parametrizations.")
    return head + tail.removesuffix(".original") if found and tail.endswith(".original") else name
