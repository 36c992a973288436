"""From the flags of a sweep to the engine that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qtdog.core.errors import ConfigError
from qtdog.sweep.engine import Engine
from qtdog.sweep.local import LocalEngine, default_threads, n_cores
from qtdog.sweep.plan import Plan
from qtdog.sweep.ray_engine import RayEngine
from qtdog.sweep.slurm_engine import Job, SlurmEngine, batch_script
from qtdog.training.loggers.logger import watched


@dataclass(frozen=True)
class Machines:
    """What the user asked the runs to be made on.

    Attributes:
        engine: local, ray or slurm.
        workers: runs at a time; None for one per core, with ray for as many as there is room for.
        threads: of each; None for all cores shared out.
        gpus: of each.
        address: of a Ray cluster.
        partition: of Slurm.
        hours: of each Slurm job.
        loggers: who is told of the runs' numbers.
    """

    engine: str = "local"
    workers: int | None = None
    threads: int | None = None
    gpus: float = 0.0
    address: str | None = None
    partition: str = ""
    hours: float = 4.0
    loggers: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse flags that the engine would not read.

        Raises:
            ConfigError: naming the flag.
        """
        readers = {"--address": ("ray",), "--gpus": ("ray", "slurm"), "--partition": ("slurm",)}
        given = {"--address": self.address, "--gpus": self.gpus, "--partition": self.partition}
        watched(self.loggers, Path())
        if self.loggers and self.engine != "local":
            raise ConfigError("--log is for --engine local; on a cluster look at the run folders")
        for flag, engines in readers.items():
            if given[flag] and self.engine not in engines:
                raise ConfigError(f"{flag} is for --engine {' or '.join(engines)}; leave it out for {self.engine}")

    @property
    def n_workers(self) -> int:
        """Runs at a time on this machine."""
        return self.workers or max(1, n_cores() // (self.threads or 1))

    @property
    def n_threads(self) -> int:
        """Threads of each run on this machine."""
        return self.threads or default_threads(self.n_workers)


def make_engine(machines: Machines, plan: Plan, folder: Path) -> Engine:
    """Return the engine, ready to start tasks.

    Raises:
        ConfigError, RunError: what it needs is not installed or not there.
    """
    if machines.engine == "ray":
        workers = machines.workers if machines.address else machines.n_workers
        threads = (machines.threads or 1) if machines.address else machines.n_threads
        how = {"workers": workers, "threads": threads, "gpus": machines.gpus, "address": machines.address}
        return RayEngine(folder, plan.source, **how)
    if machines.engine == "slurm":
        return SlurmEngine(folder, plan.source, workers=machines.workers or 64, job=_job(machines))
    how = {"workers": machines.n_workers, "threads": machines.n_threads, "loggers": machines.loggers}
    return LocalEngine(folder, plan.source, **how)


def show_batch_script(machines: Machines, folder: Path) -> None:
    """Print the batch script of a dry run with Slurm; nothing for other engines."""
    if machines.engine == "slurm":
        from qtdog.cli.console import out

        out.print(batch_script(_job(machines), folder), highlight=False, markup=False, soft_wrap=True)


def _job(machines: Machines) -> Job:
    return Job(machines.threads or 1, int(machines.gpus), machines.hours, machines.partition)
