"""Options that the commands of `qtdog sweep` have in common."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qtdog.cli.flags import LOG, panel

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
