"""The Ray engine: tasks on a Ray cluster, or on this machine through Ray."""

from __future__ import annotations

import contextlib
import logging
import uuid
from pathlib import Path
from typing import Any

from qtdog.core.errors import ConfigError, RunError, extra
from qtdog.sweep.journal import Outcome, state_folder
from qtdog.sweep.plan import Task
from qtdog.sweep.worker import do_task, do_task_elsewhere, inputs, unpack


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

    A machine that sees the sweep's folder works in it. Another one gets what the task needs, works in a folder of its
    own and sends the run folder back; what it had done is lost if it dies.

    Args:
        out: the sweep's folder.
        source: what opens the data set, on every machine.
        workers: runs at a time; None for as many as the cluster has room for.
        threads: CPUs of each run.
        gpus: GPUs of each run; a fraction shares one.
        address: of a cluster ("auto", "ray://host:10001"); None to use this machine.
        shared: whether all machines see the folder; None to find out for each task.

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
    ) -> None:
        ray = self._ray = import_ray()
        self._out, self._source, self._threads, self._shared = out.absolute(), source, threads, shared
        own = {} if address else {"num_cpus": (workers or 1) * threads, "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(f"no Ray cluster at {address}: {error}. On its head: ray start --head") from error
        room = int(ray.cluster_resources().get("CPU", 1) // threads)
        self.slots = workers or max(1, room)
        token = state_folder(self._out) / f"seen-{uuid.uuid4().hex}"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
        self._token = token
        self._send = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_work)
        self._running: dict[Any, str] = {}

    def start(self, task: Task) -> None:
        """Hand a task to the cluster."""
        parcels = None if self._shared else inputs(task, self._out)
        where = (str(self._out), str(self._token), self._shared)
        reference = self._send.remote(task.to_json(), parcels, where, self._source, self._threads)
        self._running[reference] = task.name

    def poll(self, timeout_s: float) -> list[Outcome]:
        """Return the tasks that ended since, after at most `timeout_s` seconds."""
        ray = self._ray
        ended, _ = ray.wait(list(self._running), num_returns=len(self._running) or 1, timeout=timeout_s)
        outcomes = []
        for reference in ended:
            name = self._running.pop(reference)
            try:
                answer, content = ray.get(reference)
                if content:
                    unpack(content, self._out / name)
                outcomes.append(Outcome(**answer))
            except ray.exceptions.TaskCancelledError:
                outcomes.append(Outcome(name, "stopped"))
            except (ray.exceptions.RayError, OSError, RunError) as error:
                outcomes.append(Outcome(name, "lost", str(error).splitlines()[0][:300], type(error).__name__))
        return outcomes

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


def _work(
    tree: dict[str, Any], parcels: Any, where: tuple[str, str, bool | None], source: str, threads: int
) -> tuple[Any, bytes]:
    """Be a Ray task."""
    out, token, shared = where
    if parcels is None or (shared is None and Path(token).is_file()):
        return do_task(tree, out, source, threads), b""
    return do_task_elsewhere(tree, parcels, source, threads)
