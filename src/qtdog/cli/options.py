"""Each option of the command line, declared once."""

from __future__ import annotations

from enum import StrEnum
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


_STUDY = "Study file: methods, a grid of targets, seeds and any configuration values."
_ONLY = (
    "Only runs whose labels or folder contain these words, like 'lsq target=sketch seed=0', and what they need. "
    "'sma' also finds lsq+sma; 'method=sma' is just that one."
)
_WORKERS = "Runs at a time. Default: one per GPU, or where there is none one per core, divided by --threads."
_THREADS = "Threads of each run. Default: so that all workers together use the cores."
_ADDRESS = "Of a Ray cluster: auto, or ray://host:10001. Default: this machine."
_GPUS = "GPUs of each run; a fraction shares one. Default: on this machine one if there are any, on a cluster none."
_HOURS = "Of each Slurm job; a run that is not finished goes on in a new one."


class EngineName(StrEnum):
    """Who runs the runs."""

    LOCAL = "local"
    RAY = "ray"
    SLURM = "slurm"


StudyFile = Annotated[Path, typer.Argument(help=_STUDY, metavar="STUDY")]
OutFolder = Annotated[Path | None, typer.Option(help="Folder of the run folders. Default: runs/NAME of the study.")]
DataFolder = Annotated[str | None, typer.Option(help="Where the images are, if not where the study says.")]
Only = Annotated[str | None, typer.Option(help=_ONLY)]
Log = Annotated[list[str] | None, typer.Option(metavar="LOGGER", help=LOG)]
EngineChoice = Annotated[EngineName, panel("Machines", "Who runs the runs.")]
Workers = Annotated[int | None, panel("Machines", _WORKERS, min=1)]
Threads = Annotated[int | None, panel("Machines", _THREADS, min=1)]
Gpus = Annotated[float | None, panel("Machines", _GPUS, min=0)]
Address = Annotated[str | None, panel("Machines", _ADDRESS)]
Partition = Annotated[str, panel("Machines", "Of Slurm.")]
Hours = Annotated[float, panel("Machines", _HOURS, min=0.1)]
