"""How the runs that a machine makes at a time share its cores and GPUs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qtdog.core.errors import ConfigError
from qtdog.core.machine import n_cores

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Crew:
    """The workers of a local sweep.

    Attributes:
        workers: runs at a time.
        threads: of each.
        gpus: names of the GPUs that are shared out, one for each worker, as CUDA_VISIBLE_DEVICES has them; none: the
            workers see no GPU.
    """

    workers: int
    threads: int
    gpus: tuple[str, ...] = ()

    def emptiest(self, in_use: Iterable[str]) -> str:
        """Return the GPU that has the fewest runs; "" without GPUs.

        Args:
            in_use: the GPU of each run that is under way.

        Example:
            >>> Crew(4, 1, ("0", "1")).emptiest(["0", "1", "0"])
            '1'
        """
        counts = Counter(in_use)
        return min(self.gpus, key=lambda gpu: counts[gpu], default="")


def make_crew(*, workers: int | None, threads: int | None, gpus: float | None) -> Crew:
    """Return how runs share this machine.

    Args:
        workers: runs at a time; None for as many as the GPUs hold, or without GPUs one for each `threads` cores.
        threads: of each; None so that all workers together use the cores, and no more.
        gpus: of each, at most 1; a fraction lets several runs share one. None for one where there are any, 0 for none.

    Raises:
        ConfigError: more than one GPU for each run, or GPUs where there are none.
    """
    share = 1.0 if gpus is None else gpus
    found = visible_gpus() if share else ()
    if share > 1:
        raise ConfigError(
            f"--gpus {share:g}: a run of a local sweep is one process and uses one GPU; give at most 1. "
            "One run on several: accelerate launch -m qtdog train"
        )
    if gpus and not found:
        raise ConfigError(f"--gpus {gpus:g}: there is no GPU here; leave it out, and the runs use the cores")
    n = workers or (int(len(found) / share + 1e-9) if found else max(1, n_cores() // (threads or 1)))
    return Crew(n, threads or default_threads(n), found)


def visible_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that this process may use."""
    named = os.environ.get(GPU_VARIABLE)
    n = torch.cuda.device_count()
    return tuple(name.strip() for name in named.split(",")[:n]) if named else tuple(str(i) for i in range(n))


def default_threads(workers: int) -> int:
    """Return the threads of each worker so that together they use the cores of this machine, and no more.

    Example:
        >>> default_threads(10**6)
        1
    """
    return max(1, n_cores() // workers)
