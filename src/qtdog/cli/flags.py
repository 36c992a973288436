"""Options that `train`, `distill`, `dart` and `bits` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

OUT = "The run folder itself (with several runs: the folder that holds them). Default: runs/<hash>."
LOG = "Send numbers to tensorboard, wandb or mlflow as well; may be given several times."


def panel(name: str, text: str, *spelling: str, **more: Any) -> Any:
    """Return an option with its help text and the heading under which `--help` shows it."""
    return typer.Option(*spelling, help=text, rich_help_panel=name, **more)


_DATA = "Data set name (rotated-digits, pacs), a folder ROOT/DOMAIN/CLASS/image, or a .csv/.jsonl manifest."
_PRESET = "Preset (qtdog list presets) or YAML file; may be given several times, later ones win."
_SET = panel("Configuration", "Any configuration value.", "--set", metavar="SECTION.KEY=VALUE")
_RESUME = "Go on from the last checkpoint; with --out alone the saved configuration is used."

Data = Annotated[str | None, panel("Problem", _DATA)]
Trial = Annotated[int | None, panel("Problem", "Which random 20 % of each domain is held out.")]
ImageSize = Annotated[int | None, panel("Problem", "Pixels.")]
Presets = Annotated[list[str] | None, panel("Configuration", _PRESET)]
Assignments = Annotated[list[str] | None, _SET]
Backbone = Annotated[str | None, panel("Method", "Any timm model, digits_cnn or mnist_cnn.")]
Weights = Annotated[str | None, panel("Method", "'imagenet', 'none', or a .safetensors/.pth file.")]
Objective = Annotated[str | None, panel("Method", "The loss.")]
StepRule = Annotated[str | None, panel("Method", "How the loss becomes an update.")]
Averager = Annotated[str | None, panel("Method", "Which weights are kept.")]
Quantizer = Annotated[str | None, panel("Method", "'lsq', or 'none' for a float model.")]
Bits = Annotated[int | None, panel("Method", "Bits per weight, 2 to 8.")]
Steps = Annotated[int | None, panel("Training", "Number of updates.")]
BatchSize = Annotated[int | None, panel("Training", "Images per source domain per step.")]
LearningRate = Annotated[float | None, panel("Training", "Learning rate.")]
Seed = Annotated[int | None, panel("Training", "Of initialisation, batches and augmentation.")]
RunFolderOrNone = Annotated[Path | None, panel("Run", OUT)]
Resume = Annotated[bool, panel("Run", _RESUME, "--resume")]
AsJson = Annotated[bool, panel("Run", "Print the results as JSON.", "--json")]
