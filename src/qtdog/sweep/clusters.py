"""The engines for clusters: Ray (also on this machine alone), and Slurm through submitit."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tarfile
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import ConfigError, RunError, extra
from qtdog.core.files import replacing_folder
from qtdog.sweep.journal import Outcome, state_folder
from qtdog.sweep.local import failure, run_task_from_json
from qtdog.sweep.plan import Task

Answer = dict[str, Any]
MEMBER_FILES = ("config.yaml", "result.json", "model.safetensors")


def import_ray() -> Any:
    """Return the module `ray`.

    Raises:
        ConfigError: it is not installed; the text names the extra.
    """
    with extra("ray", "--engine ray needs Ray", ConfigError):
        import ray
    return ray


class RayEngine:
    """Sends each task to a Ray worker with as many CPUs and GPUs as asked for; Ray decides where.

    A machine that sees the sweep's folder works in it. Another one says so, then gets the files that the task needs,
    works in a folder of its own and sends the run folder back; if it dies, the run begins anew.

    Args:
        out: the sweep's folder.
        source: what opens the data set, on every machine.
        workers: runs at a time; None for as many as the cluster has room for.
        threads: CPUs of each run.
        gpus: GPUs of each run; a fraction shares one.
        address: of a cluster ("auto", "ray://host:10001"); None to use this machine.
        shared: whether all engine_options see the folder; None to find out.
        ray: the module; None to import it.

    Raises:
        ConfigError: Ray is not installed.
        RunError: there is no cluster at the address.
    """

    def __init__(
        self,
        out: Path,
        source: str,
        *,
        workers: int | None,
        threads: int,
        gpus: float = 0.0,
        address: str | None = None,
        shared: bool | None = None,
        ray: Any = None,
    ) -> None:
        ray = self._ray = ray or import_ray()
        self._out, self._source, self._threads = out.absolute(), source, threads
        self._send_files = shared is False
        own = {} if address else {"num_cpus": (workers or 1) * threads, "include_dashboard": False}
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports its use to its makers
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(f"no Ray cluster at {address}: {error}. On its head: ray start --head") from error
        room = int(ray.cluster_resources().get("CPU", 1) // threads)
        self.slots = workers or max(1, room)
        token = state_folder(self._out) / f"seen-{uuid.uuid4().hex}"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
        self._token = token
        self._shared_folder = None if shared is False else (str(self._out), str(token))
        self._remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_ray_task)
        self._running: dict[Any, Task] = {}

    def start(self, task: Task) -> None:
        """Hand a task to the cluster; its files go along only after a machine said that it does not see the folder."""
        self._submit(task, task_files(task, self._out) if self._send_files else None)

    def _submit(self, task: Task, files: Mapping[str, bytes] | None) -> None:
        reference = self._remote.remote(task.to_json(), files, self._shared_folder, self._source, self._threads)
        self._running[reference] = task

    def poll(self, timeout_s: float) -> list[Outcome]:
        """Return the tasks that ended since, after at most `timeout_s` seconds."""
        if not self._running:
            time.sleep(timeout_s)
            return []
        ended, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        found = [self._outcome(reference, self._running.pop(reference)) for reference in ended]
        return [outcome for outcome in found if outcome is not None]

    def _outcome(self, reference: Any, task: Task) -> Outcome | None:
        """Return how a task ended; None if it was sent again, with its files."""
        ray, name = self._ray, task.name
        try:
            answer, content = ray.get(reference)
            if answer is None:
                self._send_files = True
                self._submit(task, task_files(task, self._out))
                return None
            if content:
                unpack_folder(content, self._out / name)
            return Outcome(**answer)
        except ray.exceptions.TaskCancelledError:
            return Outcome(name, "stopped")
        except (OSError, RunError) as error:
            return failure(task, error, 0.0)
        except ray.exceptions.RayError as error:
            return Outcome(name, "lost", str(error).splitlines()[0][:300], type(error).__name__)

    def stop(self) -> None:
        """Ask all that run to save their state and end."""
        for reference in self._running:
            with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.cancel(reference, force=False)

    def close(self) -> None:
        """Leave the cluster."""
        self.stop()
        self._token.unlink(missing_ok=True)
        self._ray.shutdown()


def _ray_task(
    tree: dict[str, Any],
    files: Mapping[str, bytes] | None,
    shared_folder: tuple[str, str] | None,
    source: str,
    threads: int,
) -> tuple[Answer | None, bytes]:
    """Do a task on a machine of the cluster; return nothing if it sees neither the folder nor files."""
    if shared_folder is not None and Path(shared_folder[1]).is_file():
        return run_task_from_json(tree, shared_folder[0], source, threads), b""
    if files is None:
        return None, b""
    return run_task_with_files(tree, files, source, threads)


def run_task_with_files(
    tree: dict[str, Any], files: Mapping[str, bytes], source: str, threads: int
) -> tuple[Answer, bytes]:
    """Do a task in a temporary folder of this machine, and return the outcome and the run folder.

    Args:
        tree: `Task.to_json`.
        files: what the task needs, from `task_files`.
        source: what opens the data set on this machine.
        threads: number of threads to use.
    """
    with tempfile.TemporaryDirectory(prefix="qtdog-") as name:
        for folder, content in files.items():
            unpack_folder(content, Path(name) / folder)
        # Only this run's folder goes back: runs that share its updates train by themselves.
        answer = run_task_from_json(tree | {"shared_runs": []}, name, source, threads)
        made = Path(name) / tree["name"]
        return answer, pack(made) if made.is_dir() else b""


def task_files(task: Task, out: Path) -> dict[str, bytes]:
    """Return what another machine needs for a task: folder name → archive.

    That is the run so far, the checkpoint that it forks from, or of an ensemble's members the files that are read.
    """
    archives = {}
    if task.folder(out).is_dir():
        archives[task.name] = pack(task.folder(out))
    if task.fork_from:
        checkpoint = f"checkpoint/step-{task.step:08d}"
        if (out / task.fork_from / checkpoint).is_dir():
            archives[task.fork_from] = pack(out / task.fork_from, [checkpoint])
    if task.ensemble is not None:
        for name in task.ensemble.members:
            archives[name] = pack(out / name, [file for file in MEMBER_FILES if (out / name / file).exists()])
    return archives


def pack(folder: Path, only: Sequence[str] = ()) -> bytes:
    """Return the content of a run folder as an uncompressed tar archive, without locks and temporary files.

    Args:
        folder: of the run.
        only: names in it, like "checkpoint/step-00000010"; all if empty.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in only or sorted(path.name for path in folder.iterdir()):
            archive.add(folder / name, arcname=name, filter=_without_temporary)
    return stream.getvalue()


def _without_temporary(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(info.name).name
    return None if name == ".lock" or name.endswith(".tmp") else info


def unpack_folder(content: bytes, folder: Path) -> None:
    """Make `folder` hold what `pack` packed, all at once; what it held before is replaced.

    Raises:
        tarfile.TarError: the archive is damaged, or would write outside of the folder.
        RunError: the disk is full; the old content is still there.
    """
    with replacing_folder(folder) as new, tarfile.open(fileobj=io.BytesIO(content), mode="r") as archive:
        archive.extractall(new, filter="data")


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
