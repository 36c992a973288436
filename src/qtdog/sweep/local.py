"""Tasks of a sweep in this process, and the local engine: a pool of worker processes that share cores and GPUs."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from qtdog.core.errors import ConfigError, FolderInUseError, Interrupted, QtdogError
from qtdog.core.machine import n_cores
from qtdog.core.printable import printable
from qtdog.data.dataset import DomainDataset
from qtdog.data.open import open_any, without_unreadable
from qtdog.ensemble.assemble import EnsembleSpec, assemble, finished
from qtdog.ensemble.model import read_member, share_splits
from qtdog.ensemble.scoring import open_evaluation_set
from qtdog.ensemble.teacher import load_teacher
from qtdog.ensemble.weight_averaging import Recipe
from qtdog.runs.folder import RunFolder
from qtdog.sweep.journal import MAX_WARNING_CHARS, MAX_WARNINGS, Outcome, Status, state_folder
from qtdog.sweep.plan import Task
from qtdog.training.checkpoint import Checkpoint, read_checkpoint
from qtdog.training.loggers import with_loggers
from qtdog.training.plugins import place_in_plugin
from qtdog.training.run import RunCallbacks, run, train_fork_point
from qtdog.training.shared_steps import SharedRun

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def run_task(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> Outcome:
    """Do a task, or go on with it, and return how it ended; never raises an Exception.

    Args:
        task: what to do; what it needs is done.
        out: the sweep's folder.
        dataset: the data that the task's configuration names, whole: `data.skip_unreadable` is done here.
        callbacks: receives the progress and numbers of the run, and its warnings with the name of the task.
    """
    started, warnings, warn = time.perf_counter(), list[str](), callbacks.warn

    def keep(text: str) -> None:
        warn(f"{task.text}: {text}")  # of many runs, which one
        if len(warnings) < MAX_WARNINGS and text not in warnings:
            warnings.append(text[:MAX_WARNING_CHARS])

    return replace(_run_task(task, out, dataset, replace(callbacks, warn=keep), started), warnings=tuple(warnings))


def _run_task(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks, started: float) -> Outcome:
    try:
        task.load_plugins()
        if _skips_unreadable(task, out):
            dataset = without_unreadable(dataset, callbacks.progress)
        trained_s = _WORK[task.kind](task, out, dataset, callbacks)
        return Outcome(task.name, "done", seconds=_since(started), trained_s=trained_s)
    except Exception as error:
        return failure(task, error, _since(started))


def failure(task: Task, error: Exception, seconds: float) -> Outcome:
    """Return the outcome of a task that ended with an error; print the traceback of one that is not the user's."""
    if not isinstance(error, QtdogError):
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            traceback.print_exc()
    status: Status = "disk" if is_disk_error(error) else "failed"
    if isinstance(error, FolderInUseError):
        status = "busy"
    elif isinstance(error, Interrupted):
        status = "stopped"
    reason = str(error) or type(error).__name__
    if place := place_in_plugin(error):
        reason = f"{place}: {type(error).__name__}: {reason}"
    return Outcome(task.name, status, reason[:1000], type(error).__name__, seconds=seconds)


def quiet_callbacks(loggers: Sequence[str], folder: Path) -> RunCallbacks:
    """Return callbacks that print warnings to standard error and send numbers to the loggers.

    Raises:
        ConfigError: an unknown logger.
    """
    return RunCallbacks(
        with_loggers(loggers, folder), warn=lambda text: print(printable(text), file=sys.stderr, flush=True)
    )


def is_disk_error(error: BaseException) -> bool:
    """Return whether an error, or what caused it, is that the disk is full or cannot be written."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK:
            return True
        cause = cause.__cause__
    return "No space left" in str(error)


def _skips_unreadable(task: Task, out: Path) -> bool:
    """Return whether a task's own configuration, or that of an ensemble's members, leaves out unreadable images."""
    config = task.config if task.ensemble is None else RunFolder(out / task.ensemble.members[0]).read_config()
    return config is not None and config.data.skip_unreadable


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _run(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> float:
    assert task.config is not None
    folder = RunFolder(task.folder(out))
    start = _checkpoint(task, out, callbacks)
    teacher = load_teacher(task.config, dataset)
    shared_runs = [SharedRun(config, RunFolder(out / name)) for name, config in task.shared_runs]
    result = run(
        task.config,
        dataset,
        folder,
        resume=True,
        callbacks=callbacks,
        fork_from=start,
        teacher=teacher,
        shared_runs=shared_runs,
    )
    return float(result["trained_s"])


def _checkpoint(task: Task, out: Path, callbacks: RunCallbacks) -> Checkpoint | None:
    """Return the checkpoint that a run starts from; None for step 0, also if it is gone: the result is the same."""
    path = RunFolder(out / task.fork_from).checkpoints / f"step-{task.step:08d}"
    if not task.fork_from or not path.is_dir():
        return None
    try:
        return read_checkpoint(path)
    except QtdogError as error:
        callbacks.warn(f"{error}; training from step 0 instead")
        return None


def _fork_point(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> float:
    assert task.config is not None
    made = train_fork_point(task.config, dataset, RunFolder(task.folder(out)), until=task.step, callbacks=callbacks)
    return float(made.state.get("trained_s", 0.0))


def _ensemble(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> float:
    assert task.ensemble is not None
    folder = RunFolder(task.folder(out))
    spec = EnsembleSpec(task.ensemble.kind, folder.model_file, Recipe(pick=task.ensemble.pick))
    members = [read_member(out / name) for name in task.ensemble.members]
    with folder.lock():
        if finished(members, spec) is None:
            evaluation_set = open_evaluation_set(
                members[0].config, dataset, same_splits=share_splits(members), progress=callbacks.progress
            )
            assemble(members, spec, evaluation_set)
    return 0.0


_WORK: dict[str, Callable[[Task, Path, DomainDataset, RunCallbacks], Any]] = {
    "run": _run,
    "fork_point": _fork_point,
    "ensemble": _ensemble,
}


@lru_cache(maxsize=2)
def open_study_dataset(source: str) -> DomainDataset:
    """Return the data set that a source opens, once per process."""
    return open_any(source, min_domains=1)


def run_task_from_json(tree: dict[str, Any], out: str, source: str, threads: int) -> dict[str, Any]:
    """Do a task that another machine sent, in a folder that both see.

    Args:
        tree: `Task.to_json`.
        out: the sweep's folder.
        source: what opens the data set on this machine.
        threads: number of threads to use.

    Returns:
        the outcome, as a dictionary.
    """
    torch.set_num_threads(threads)
    task = Task.from_json(tree)
    task.load_plugins()  # one of them may make the data set
    return asdict(run_task(task, Path(out), open_study_dataset(source), quiet_callbacks((), Path(out))))


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
