"""The Slurm engine: each task a job, through submitit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import ConfigError, extra
from qtdog.sweep.journal import Outcome, state_folder
from qtdog.sweep.plan import Task
from qtdog.sweep.worker import run_task_from_json

SIGNAL_S = 120  # before a job's time is over


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm shall give each run.

    Attributes:
        threads: CPUs.
        gpus: GPUs.
        hours: of time; a run that is not finished then goes on in a new job, from its last checkpoint.
        partition: of the cluster; "" for its default.
    """

    threads: int = 1
    gpus: int = 0
    hours: float = 4.0
    partition: str = ""

    @property
    def parameters(self) -> dict[str, Any]:
        """What submitit is given, and makes the batch script of."""
        found: dict[str, Any] = {
            "time": max(1, round(60 * self.hours)),
            "cpus_per_task": self.threads,
            "signal_delay_s": SIGNAL_S,
            "comment": "qtdog sweep",
        }
        found |= {"gpus_per_node": self.gpus} if self.gpus else {}
        return found | ({"partition": self.partition} if self.partition else {})


def import_submitit() -> Any:
    """Return the module `submitit`.

    Raises:
        ConfigError: it is not installed; the text names the extra.
    """
    with extra("slurm", "--engine slurm needs submitit", ConfigError):
        import submitit
        import submitit.slurm.slurm
    return submitit


class SlurmEngine:
    """Submits each task as a job; the folder must be shared with the nodes.

    A job whose time is over, or that is preempted, goes on in a new one. The sweep's own process waits on the login
    node; if it ends, jobs go on, and the next start of the sweep finds their folders in use until they are done.

    Args:
        out: the sweep's folder, seen by all nodes.
        source: what opens the data set there.
        workers: jobs at a time.
        job: what each gets.
        cluster: "slurm"; "local" or "debug" run the same code without Slurm.

    Raises:
        ConfigError: submitit is not installed, or there is no Slurm here.
    """

    def __init__(self, out: Path, source: str, *, workers: int, job: SlurmJob, cluster: str = "slurm") -> None:
        submitit = import_submitit()
        self.slots = workers
        self._out, self._source, self._job = out.absolute(), source, job
        try:
            self._executor = submitit.AutoExecutor(state_folder(out) / "slurm", cluster=cluster)
        except RuntimeError as error:
            raise ConfigError(f"--engine slurm: {error}. Start it on a machine with the command sbatch") from error
        if cluster == "slurm":
            own = {f"slurm_{name}": value for name, value in job.parameters.items()}
            self._executor.update_parameters(name="qtdog", **own)
        else:
            self._executor.update_parameters(timeout_min=max(1, round(60 * job.hours)))
        self._running: dict[str, Any] = {}

    def start(self, task: Task) -> None:
        """Submit a task."""
        work = Work(str(self._out), self._source, self._job.threads)
        self._running[task.name] = self._executor.submit(work, task.to_json())

    def poll(self, timeout_s: float) -> list[Outcome]:
        """Return the tasks that ended since, after at most `timeout_s` seconds."""
        time.sleep(timeout_s)
        outcomes = []
        for name, job in list(self._running.items()):
            if not job.done():
                continue
            del self._running[name]
            error = job.exception()
            if error is None:
                outcomes.append(Outcome(**job.result()))
            else:
                outcomes.append(Outcome(name, "lost", str(error).splitlines()[0][:300], type(error).__name__))
        return outcomes

    def stop(self) -> None:
        """Cancel the jobs; Slurm sends SIGTERM, and what runs saves its state."""
        for job in self._running.values():
            job.cancel()

    def close(self) -> None:
        """Cancel what is left."""
        self.stop()


class Work:
    """A task as submitit calls it, again in a new job when the time of the first is over."""

    def __init__(self, out: str, source: str, threads: int) -> None:
        self.out, self.source, self.threads = out, source, threads

    def __call__(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Do the task."""
        return run_task_from_json(tree, self.out, self.source, self.threads)

    def checkpoint(self, tree: dict[str, Any]) -> Any:
        """Return what the next job shall do: the same; it goes on from the last checkpoint."""
        return import_submitit().helpers.DelayedSubmission(self, tree)
