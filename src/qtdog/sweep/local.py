"""The local engine: a process per run on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtdog.sweep.crew import Crew
from qtdog.sweep.notes import Outcome, state_folder
from qtdog.sweep.task import Task

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
