"""The local engine: a pool of worker processes on this machine that shares out its cores and GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtdog.core.errors import ConfigError
from qtdog.core.machine import n_cores
from qtdog.sweep.journal import Outcome, state_folder
from qtdog.sweep.plan import Task

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


THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class LocalEngine:
    """Forks a worker per task from one process that has imported everything (`sweep.nursery`).

    The death of a worker, or of that process, loses no more than the work since the last checkpoints: a new one is
    started with the next task.

    Args:
        out: the sweep's folder.
        source: what opens the data set.
        crew: how they share the machine.
        loggers: who is told of the runs' numbers.
    """

    def __init__(self, out: Path, source: str, crew: Crew, *, loggers: Sequence[str] = ()) -> None:
        self.slots, self._crew, self._loggers = crew.workers, crew, tuple(loggers)
        self._out, self._source = out, source
        self._nursery: subprocess.Popen[bytes] | None = None
        self._gpus: dict[str, str] = {}  # by running task
        self._running: dict[str, int] = {}  # by task; 0 until the process is known
        self._buffer = b""

    @property
    def pids(self) -> dict[str, int]:
        """The process of each running task that is known."""
        return {name: pid for name, pid in self._running.items() if pid}

    def start(self, task: Task) -> None:
        """Begin a task in a process of its own."""
        gpu = self._crew.emptiest(self._gpus.values())
        line = json.dumps({"task": task.to_json(), "gpu": gpu}).encode() + b"\n"
        self._running[task.name], self._gpus[task.name] = 0, gpu
        nursery = self._open()
        assert nursery.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died this moment: `poll` will see that
            nursery.stdin.write(line)
            nursery.stdin.flush()

    def _open(self) -> subprocess.Popen[bytes]:
        if self._nursery is not None:
            return self._nursery
        told = [str(self._out), str(self._crew.threads), self._source, *self._loggers]
        command = [sys.executable, "-m", "qtdog.sweep.nursery", *told]
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(self._crew.threads))
        log = state_folder(self._out) / "logs" / "nursery.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        pipe = subprocess.PIPE
        with log.open("ab") as stream:
            self._nursery = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=stream, env=environment, start_new_session=True
            )
        return self._nursery

    def poll(self, timeout_s: float) -> list[Outcome]:
        """Return the tasks that ended since, after at most `timeout_s` seconds."""
        nursery = self._nursery
        if nursery is None or nursery.stdout is None:
            time.sleep(timeout_s)
            return []
        outcomes = []
        if select.select([nursery.stdout], [], [], timeout_s)[0]:
            chunk = os.read(nursery.stdout.fileno(), 1 << 16)
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            outcomes = [told for line in lines if (told := self._hear(json.loads(line))) is not None]
        if nursery.poll() is not None:
            outcomes += self._bury(nursery)
        return outcomes

    def _hear(self, line: dict[str, Any]) -> Outcome | None:
        if "pid" in line:
            self._running[line["name"]] = line["pid"]
        if "status" not in line:
            return None
        self._running.pop(line["name"], None)
        self._gpus.pop(line["name"], None)
        return Outcome(**line)

    def _bury(self, nursery: subprocess.Popen[bytes]) -> list[Outcome]:
        """Give up a nursery that ended: its workers stop by themselves and keep their folders until then."""
        reason = f"the process that starts workers ended ({nursery.returncode})"
        lost = [Outcome(name, "lost", reason) for name in self._running]
        self._running.clear()
        self._gpus.clear()
        self._forget(nursery)
        return lost

    def _forget(self, nursery: subprocess.Popen[bytes]) -> None:
        for pipe in (nursery.stdin, nursery.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        self._nursery, self._buffer = None, b""

    def stop(self) -> None:
        """Ask all workers to save their state and end."""
        if self._nursery is not None and self._nursery.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._nursery.stdin.close()

    def close(self) -> None:
        """End the nursery; workers that are left stop by themselves."""
        self.stop()
        nursery = self._nursery
        if nursery is None:
            return
        try:
            nursery.wait(timeout=5)
        except subprocess.TimeoutExpired:
            nursery.kill()
            nursery.wait()
        self._forget(nursery)
