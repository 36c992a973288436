"""Each option of the command line, declared once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

OUT = "Run folder to write (with several runs: the folder that holds theirs). Default: runs/HASH."
LOG = "Also send the numbers to tensorboard, wandb or mlflow. May be given several times."


def panel(name: str, text: str, *spelling: str, **more: Any) -> Any:
    """Return an option with its help text and the heading under which `--help` shows it."""
    return typer.Option(*spelling, help=text, rich_help_panel=name, **more)


_MODEL = "Model file (.safetensors) of 'qtdog train' or 'ensemble', or the folder that it is in."
AS_JSON = "Print the result as JSON; the same as --format json."
_DATA = (
    "Data set: a name (rotated-digits, pacs), a folder ROOT/DOMAIN/CLASS/image, or a .csv/.jsonl manifest. Default: "
    "the embedded rotated digits."
)
_TRIAL = "Which random 20 % of each source domain is held out for model selection. Default 0."
_SIZE = "Image size in pixels (square). Default 224, or what the data set's preset says."
_PRESET = "Preset (see 'qtdog list presets') or YAML file. May be given several times; later ones win."
_SET = panel(
    "Configuration",
    "Set any value of the configuration (see 'qtdog list options'). May be given several times.",
    "--set",
    metavar="SECTION.KEY=VALUE",
)
_BACKBONE = (
    "Backbone: any timm model, digits_cnn, mnist_cnn, a plug-in's. Default resnet50.tv_in1k, or as the preset says."
)
_WEIGHTS = "Initial weights: 'imagenet', 'none', or a .safetensors/.pth file. Default 'imagenet'."
_OBJECTIVE = "Training objective (see 'qtdog list objectives'). Default erm."
_STEP_RULE = "How a gradient becomes an update: plain, sam or sagm. Default plain."
_AVERAGER = "Weight averaging: none, sma, swa, bma or swad (see 'qtdog list averagers'). Default none."
_QUANTIZER = "Quantizer (see 'qtdog list quantizers'), or 'none' to train in float. Default lsq."
_BITS = "Bits per weight, 2 to 8. Default 7."
_STEPS = "Number of updates. Default 5000, or what the data set's preset says."
_BATCH = "Number of images per source domain in each step. Default 32, or what the data set's preset says."
_RATE = "Learning rate. Default 5e-5, or what the data set's preset says."
_SEED = "Seed of initialization, batches and augmentation. Default 0."
_RESUME = "Continue from the last checkpoint. With --output alone the saved configuration is used."

Model = Annotated[Path, typer.Argument(help=_MODEL, metavar="MODEL")]
Data = Annotated[str | None, panel("Data", _DATA)]
Trial = Annotated[int | None, panel("Data", _TRIAL)]
ImageSize = Annotated[int | None, panel("Data", _SIZE)]
Presets = Annotated[list[str] | None, panel("Configuration", _PRESET)]
Assignments = Annotated[list[str] | None, _SET]
Backbone = Annotated[str | None, panel("Method", _BACKBONE)]
Weights = Annotated[str | None, panel("Method", _WEIGHTS)]
Objective = Annotated[str | None, panel("Method", _OBJECTIVE)]
StepRule = Annotated[str | None, panel("Method", _STEP_RULE)]
Averager = Annotated[str | None, panel("Method", _AVERAGER)]
Quantizer = Annotated[str | None, panel("Method", _QUANTIZER)]
Bits = Annotated[int | None, panel("Method", _BITS)]
Steps = Annotated[int | None, panel("Training", _STEPS)]
BatchSize = Annotated[int | None, panel("Training", _BATCH)]
LearningRate = Annotated[float | None, panel("Training", _RATE)]
Seed = Annotated[int | None, panel("Training", _SEED)]
RunFolderOrNone = Annotated[Path | None, panel("Run", OUT, "--output", "-o")]
Resume = Annotated[bool, panel("Run", _RESUME, "--resume")]
AsJson = Annotated[bool, panel("Run", AS_JSON, "--json")]
JsonOutput = Annotated[bool, typer.Option("--json", help=AS_JSON)]


_FOLDER = "Folder of the run folders. Default: runs/NAME of the study."
_STUDY = "Study file: methods, a grid of targets, seeds and any configuration values."
_ONLY = (
    "Only runs whose labels or folder contain these words, like 'lsq target=sketch seed=0', and what they need. "
    "'sma' also finds lsq+sma; 'method=sma' is just that one."
)
_WORKERS = "Number of runs at a time. Default: one per GPU, or where there is none one per core, divided by --threads."
_THREADS = "Threads of each run; the last bits depend on it. Default: 1, with GPUs the cores shared out."
_ENGINE = "What makes the runs: processes on this machine, Ray, or Slurm."
_ADDRESS = "Address of a Ray cluster: auto, or ray://host:10001. Default: this machine."
_GPUS = "GPUs of each run; a fraction shares one. Default: on this machine one if there are any, on a cluster none."
_HOURS = "Hours of each Slurm job; a run that is not finished continues in a new one. Default 4."


class EngineName(StrEnum):
    """Who runs the runs."""

    LOCAL = "local"
    RAY = "ray"
    SLURM = "slurm"


StudyFile = Annotated[Path, typer.Argument(help=_STUDY, metavar="STUDY")]
OutFolder = Annotated[Path | None, typer.Option("--output", "-o", help=_FOLDER)]
RunsFolder = Annotated[Path | None, typer.Option("--runs", help=_FOLDER)]
DataFolder = Annotated[str | None, typer.Option(help="Data set, if it is not where the study says.")]
Only = Annotated[str | None, typer.Option(help=_ONLY)]
Log = Annotated[list[str] | None, typer.Option(metavar="LOGGER", help=LOG)]
EngineChoice = Annotated[EngineName, panel("Machines", _ENGINE)]
Workers = Annotated[int | None, panel("Machines", _WORKERS, min=1)]
Threads = Annotated[int | None, panel("Machines", _THREADS, min=1)]
Gpus = Annotated[float | None, panel("Machines", _GPUS, min=0)]
Address = Annotated[str | None, panel("Machines", _ADDRESS)]
Partition = Annotated[str, panel("Machines", "Partition of Slurm. Default: the cluster's own.")]
Hours = Annotated[float, panel("Machines", _HOURS, min=0.1)]
