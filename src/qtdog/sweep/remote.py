"""Doing a task on another machine, for engines that send it there."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qtdog.data.dataset import DomainDataset
from qtdog.data.open import open_any
from qtdog.sweep.artefacts import Parcels, pack, unpack
from qtdog.sweep.task import Task
from qtdog.sweep.work import perform
from qtdog.training.run import Voice

Answer = dict[str, Any]


@lru_cache(maxsize=2)
def _dataset(source: str) -> DomainDataset:
    return open_any(source, min_domains=1)


def do_task(tree: dict[str, Any], out: str, source: str, threads: int) -> Answer:
    """Do a task in a folder that this machine shares with the sweep's.

    Args:
        tree: `Task.to_json`.
        out: the sweep's folder.
        source: what opens the data set on this machine.
        threads: to use.

    Returns:
        the outcome, as a dictionary.
    """
    torch.set_num_threads(threads)
    voice = Voice(warn=lambda text: print(text, file=sys.stderr, flush=True))
    return asdict(perform(Task.from_json(tree), Path(out), _dataset(source), voice))


def do_task_elsewhere(tree: dict[str, Any], parcels: Parcels, source: str, threads: int) -> tuple[Answer, bytes]:
    """Do a task in a folder of this machine, and return the outcome and the run folder.

    Args:
        tree: `Task.to_json`.
        parcels: what it needs (`sweep.artefacts.inputs`).
        source: what opens the data set on this machine.
        threads: to use.
    """
    with tempfile.TemporaryDirectory(prefix="qtdog-") as name:
        for folder, content in parcels.items():
            unpack(content, Path(name) / folder)
        # only this run's folder goes back: whoever would come along trains by itself
        answer = do_task(tree | {"along": []}, name, source, threads)
        made = Path(name) / tree["name"]
        return answer, pack(made) if made.is_dir() else b""
