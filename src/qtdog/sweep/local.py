"""The local engine: a pool of worker processes on this machine that share its cores and GPUs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from qtdog.core.errors import ConfigError
from qtdog.core.machine import n_cores
from qtdog.sweep.journal import Outcome, state_folder
from qtdog.sweep.plan import Task
from qtdog.sweep.worker import failure, open_study_dataset, quiet_callbacks, run_task

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PRELOAD = ["qtdog.sweep.local"]  # what the fork server imports, so that a worker need not
SERVER_ENDED = 255  # the exit code that `multiprocessing` gives to all workers of a fork server that died
CLOSE_S = 5.0  # that `close` waits for the workers


@dataclass(frozen=True)
class Resources:
    """How the runs of a local sweep share this machine.

    Attributes:
        workers: number of runs at a time.
        threads: number of threads of each run.
        gpus: names of the GPUs that are shared out, one for each worker, as CUDA_VISIBLE_DEVICES has them. Without
            any the workers see no GPU.
    """

    workers: int
    threads: int
    gpus: tuple[str, ...] = ()

    def least_used_gpu(self, in_use: Iterable[str]) -> str:
        """Return the GPU that has the fewest runs; "" without GPUs.

        Args:
            in_use: the GPU of each run that is under way.

        Example:
            >>> Resources(4, 1, ("0", "1")).least_used_gpu(["0", "1", "0"])
            '1'
        """
        counts = Counter(in_use)
        return min(self.gpus, key=lambda gpu: counts[gpu], default="")


def local_resources(
    *, workers: int | None, threads: int | None, gpus: float | None, visible: Sequence[str] | None = None
) -> Resources:
    """Return how runs share this machine.

    Args:
        workers: runs at a time; None for as many as the GPUs hold, or without GPUs one for each `threads` cores.
        threads: of each run; None for one, so that the last bits of a run do not depend on how many run at a time. On a
            GPU, where they do not depend on them, None for the cores shared out among the workers.
        gpus: of each run, at most 1; a fraction lets several runs share one. None for one where there are any, 0 for
            none.
        visible: names of the GPUs of this machine; None for those that torch sees.

    Raises:
        ConfigError: more than one GPU for each run, or GPUs where there are none.
    """
    share = 1.0 if gpus is None else gpus
    found = tuple(visible_gpus() if visible is None else visible) if share else ()
    if share > 1:
        raise ConfigError(
            f"--gpus {share:g}: a run of a local sweep is one process and uses one GPU; give at most 1. "
            "One run on several: accelerate launch -m qtdog train"
        )
    if gpus and not found:
        raise ConfigError(f"--gpus {gpus:g}: there is no GPU here; leave it out, and the runs use the cores")
    n = workers or (int(len(found) / share + 1e-9) if found else max(1, n_cores() // (threads or 1)))
    return Resources(n, threads or (default_threads(n) if found else 1), found)


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


@dataclass(frozen=True)
class WorkerSetup:
    """What all workers of a local sweep have in common.

    Attributes:
        out: the sweep's folder.
        source: what opens the data set.
        threads: of each worker.
        loggers: names of the loggers that the runs' numbers are sent to.
    """

    out: Path
    source: str
    threads: int
    loggers: tuple[str, ...]


@dataclass(frozen=True)
class _Worker:
    """A running worker: its task, its process, its GPU, and the pipe that its outcome comes through."""

    task: Task
    process: BaseProcess
    gpu: str
    outcome: connection.Connection


class LocalEngine:
    """Starts one worker process per task from a fork server that has imported everything.

    The death of a worker loses no more than the work since its last checkpoint. If the fork server dies, its workers go
    on, and a new server is started with the next task. If this process dies, the workers write a checkpoint and end.

    Args:
        out: the sweep's folder.
        source: what opens the data set.
        resources: how the runs share the machine.
        loggers: names of the loggers that the runs' numbers are sent to.
        context: how workers are started; None for a fork server.
    """

    def __init__(
        self,
        out: Path,
        source: str,
        resources: Resources,
        *,
        loggers: Sequence[str] = (),
        context: BaseContext | None = None,
    ) -> None:
        self.slots, self._resources = resources.workers, resources
        self._setup = WorkerSetup(out.absolute(), source, resources.threads, tuple(loggers))
        self._context: Any = context or multiprocessing.get_context("forkserver")
        self._workers: dict[str, _Worker] = {}

    @property
    def pids(self) -> dict[str, int]:
        """The process of each running task."""
        return {name: worker.process.pid for name, worker in self._workers.items() if worker.process.pid}

    def start(self, task: Task) -> None:
        """Begin a task in a process of its own."""
        gpu = self._resources.least_used_gpu(worker.gpu for worker in self._workers.values())
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_be_worker, args=(task, self._setup, gpu, theirs), name=task.name)
        with _clean_start(self._resources.threads):
            process.start()
        theirs.close()  # the worker has the only other end: its death ends the pipe
        self._workers[task.name] = _Worker(task, process, gpu, ours)

    def poll(self, timeout_s: float) -> list[Outcome]:
        """Return the tasks that ended since, after at most `timeout_s` seconds."""
        if not self._workers:
            time.sleep(timeout_s)
            return []
        by_handle: dict[connection.Connection | int, _Worker] = {}
        for worker in self._workers.values():
            by_handle[worker.outcome] = worker
            if worker.process.exitcode != SERVER_ENDED:  # of such a worker the pipe alone says when it ends
                by_handle[worker.process.sentinel] = worker
        ready = connection.wait(by_handle, timeout_s)
        ended = {worker.task.name: worker for handle, worker in by_handle.items() if handle in ready}
        return [outcome for worker in ended.values() if (outcome := self._outcome(worker)) is not None]

    def _outcome(self, worker: _Worker) -> Outcome | None:
        """Return what a worker came to; None if it still runs, without its fork server."""
        reported: Outcome | None = None
        with contextlib.suppress(EOFError, OSError):
            if worker.outcome.poll():
                reported = worker.outcome.recv()
            elif worker.process.exitcode == SERVER_ENDED:
                return None
        worker.process.join(CLOSE_S)
        del self._workers[worker.task.name]
        worker.outcome.close()
        return reported or Outcome(worker.task.name, "lost", _reason(worker.process.exitcode))

    def stop(self) -> None:
        """Ask all workers to save their state and end."""
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def close(self) -> None:
        """End all workers; one that takes long to save its state ends by itself."""
        self.stop()
        deadline = time.monotonic() + CLOSE_S
        while self._workers and time.monotonic() < deadline:
            self.poll(max(0.0, deadline - time.monotonic()))


def _reason(code: int | None) -> str:
    if code is not None and 0 > code > -signal.NSIG:
        return f"its process died of {signal.Signals(-code).name}"
    return "its process died" if code in (None, SERVER_ENDED) else f"its process ended with {code}"


@contextlib.contextmanager
def _clean_start(threads: int) -> Iterator[None]:
    """Let child processes of this block begin without the current folder, this program's main module and Ctrl-C.

    Python puts the current folder on the import path of `python -c`, with which `multiprocessing` starts its servers,
    and hands the parent's path to each child: a `timm.py` in a folder that somebody sent would be run. Without a main
    module a script that calls `qtdog.sweep` needs no `if __name__ == "__main__"`. Ctrl-C is for the sweep, which then
    asks its workers to stop.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    ours = dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in ours}
    path, main = list(sys.path), sys.modules["__main__"]
    here = {"", ".", os.getcwd(), os.path.realpath(os.getcwd())} - {str(Path(__file__).parents[2])}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        os.environ.update(ours)
        sys.path[:] = [place for place in path if place not in here]
        sys.modules["__main__"] = types.ModuleType("__main__")
        yield
    finally:
        sys.modules["__main__"] = main
        sys.path[:] = path
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _be_worker(task: Task, setup: WorkerSetup, gpu: str, answer: connection.Connection) -> None:
    """Do one task and report its outcome, also of an error before the task."""
    started = time.perf_counter()
    try:
        os.environ[GPU_VARIABLE] = gpu  # in time: nothing has asked CUDA for its devices yet
        os.setsid()  # a closed terminal must not kill a worker without a checkpoint
        _log_to(state_folder(setup.out) / "logs" / f"{task.name}.log")
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        if gpu:
            print(f"{task.name} on GPU {gpu}", flush=True)
        torch.set_num_threads(setup.threads)
        task.load_plugins()  # one of them may make the data set
        dataset = open_study_dataset(setup.source)
        outcome = run_task(task, setup.out, dataset, quiet_callbacks(setup.loggers, task.folder(setup.out)))
    except Exception as error:
        outcome = failure(task, error, time.perf_counter() - started)
    with contextlib.suppress(BrokenPipeError):  # the sweep is gone
        answer.send(outcome)


def _log_to(file: Path) -> None:
    """Send what this process prints to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _stop_with_parent() -> None:
    """Ask this worker to stop as soon as the sweep is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
