"""From the flags of a sweep to the engine that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qtdog.core.errors import ConfigError
from qtdog.sweep.local import Crew, LocalEngine, make_crew
from qtdog.sweep.plan import Plan, Task, keep_sharing
from qtdog.sweep.ray import RayEngine
from qtdog.sweep.runner import Engine
from qtdog.sweep.slurm import Job, SlurmEngine, batch_script
from qtdog.training.loggers import watched


@dataclass(frozen=True)
class Machines:
    """What the user asked the runs to be made on.

    Attributes:
        engine: local, ray or slurm.
        workers: runs at a time; None for one per GPU or core, with ray for as many as there is room for.
        threads: of each; None for all cores shared out.
        gpus: of each; None for one where there are any, with ray and slurm for none.
        address: of a Ray cluster.
        partition: of Slurm.
        hours: of each Slurm job.
        loggers: who is told of the runs' numbers.
    """

    engine: str = "local"
    workers: int | None = None
    threads: int | None = None
    gpus: float | None = None
    address: str | None = None
    partition: str = ""
    hours: float = 4.0
    loggers: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse flags that the engine would not read.

        Raises:
            ConfigError: naming the flag.
        """
        readers = {"--address": ("ray",), "--partition": ("slurm",)}
        given = {"--address": self.address, "--partition": self.partition}
        watched(self.loggers, Path())
        if self.loggers and self.engine != "local":
            raise ConfigError("--log is for --engine local; on a cluster look at the run folders")
        for flag, engines in readers.items():
            if given[flag] and self.engine not in engines:
                raise ConfigError(f"{flag} is for --engine {' or '.join(engines)}; leave it out for {self.engine}")

    def shared(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks as they are done here: where a logger listens, each run makes its own updates."""
        return [one for task in tasks for one in keep_sharing([task])] if self.loggers else list(tasks)

    @property
    def crew(self) -> Crew:
        """How the runs share this machine.

        Raises:
            ConfigError: GPUs that it does not have.
        """
        return make_crew(workers=self.workers, threads=self.threads, gpus=self.gpus)


def make_engine(machines: Machines, plan: Plan, folder: Path) -> Engine:
    """Return the engine, ready to start tasks.

    Raises:
        ConfigError, RunError: what it needs is not installed or not there.
    """
    if machines.engine == "ray":
        here = make_crew(workers=machines.workers, threads=machines.threads, gpus=0)
        workers = machines.workers if machines.address else here.workers
        threads = (machines.threads or 1) if machines.address else here.threads
        how = {"workers": workers, "threads": threads, "gpus": machines.gpus or 0.0, "address": machines.address}
        return RayEngine(folder, plan.source, **how)
    if machines.engine == "slurm":
        return SlurmEngine(folder, plan.source, workers=machines.workers or 64, job=_job(machines))
    return LocalEngine(folder, plan.source, machines.crew, loggers=machines.loggers)


def show_batch_script(machines: Machines, folder: Path) -> None:
    """Print the batch script of a dry run with Slurm; nothing for other engines."""
    if machines.engine == "slurm":
        from qtdog.cli.console import out

        out.print(batch_script(_job(machines), folder), highlight=False, markup=False, soft_wrap=True)


def _job(machines: Machines) -> Job:
    return Job(machines.threads or 1, int(machines.gpus or 0), machines.hours, machines.partition)
