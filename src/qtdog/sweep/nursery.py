"""The process from which a local sweep's workers are forked: it has imported everything, and each worker runs one task.

    python -m qtdog.sweep.nursery OUT THREADS SOURCE [LOGGER …]

Standard input: one JSON task and the GPU that it may use per line. Standard output: one JSON outcome per line; a
worker that died says nothing, and the nursery reports it as lost. At the end of its input (its parent ended, however)
it asks all workers to stop and waits for them; a worker whose nursery is gone stops by itself. Stopping means: a
checkpoint first.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qtdog.data.dataset import DomainDataset
from qtdog.data.open import open_any
from qtdog.sweep.journal import Outcome, state_folder
from qtdog.sweep.local import GPU_VARIABLE
from qtdog.sweep.plan import Task
from qtdog.sweep.worker import perform, quiet_callbacks

POLL_S = 0.05
STDIN, STDOUT = 0, 1


@dataclass(frozen=True)
class Job:
    """What all workers of a sweep have in common: its folder, its data, their threads, who is told of their numbers."""

    out: Path
    dataset: DomainDataset
    threads: int
    loggers: tuple[str, ...]


def main() -> None:
    """Serve until the input ends."""
    out, threads, source, *loggers = sys.argv[1:]
    job = Job(Path(out), open_any(source, min_domains=1), int(threads), tuple(loggers))
    workers: dict[int, str] = {}
    buffer = b""
    _say({"ready": os.getpid()})
    while True:
        if select.select([STDIN], [], [], POLL_S)[0]:
            chunk = os.read(STDIN, 1 << 16)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                order = json.loads(line)
                task = Task.from_json(order["task"])
                workers[_fork(task, job, order["gpu"])] = task.name
        _bury(workers)
    _stop(workers)


def _fork(task: Task, job: Job, gpu: str) -> int:
    nursery = os.getpid()
    pid = os.fork()
    if pid:
        _say({"name": task.name, "pid": pid})
        return pid
    code = 1
    try:
        _work(task, job, nursery, gpu)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def _work(task: Task, job: Job, nursery: int, gpu: str) -> None:
    """Be a worker: one task, then the end."""
    os.environ[GPU_VARIABLE] = gpu  # in time: nothing has asked CUDA for its devices yet
    os.setsid()  # Ctrl-C is for the sweep, which then asks its workers to stop
    answer = os.dup(STDOUT)
    _log_to(state_folder(job.out) / "logs" / f"{task.name}.log")
    threading.Thread(target=_stop_with, args=(nursery,), daemon=True).start()
    if gpu:
        print(f"{task.name} on GPU {gpu}", flush=True)
    torch.set_num_threads(job.threads)
    outcome = perform(task, job.out, job.dataset, quiet_callbacks(job.loggers, task.folder(job.out)))
    os.write(
        answer, json.dumps(asdict(outcome), ensure_ascii=False).encode() + b"\n"
    )  # short enough to be written in one piece


def _log_to(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, STDIN)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def _stop_with(nursery: int) -> None:
    """Ask this worker to stop as soon as the nursery is gone."""
    while os.getppid() == nursery:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _bury(workers: dict[int, str]) -> None:
    """Report the workers that ended."""
    for pid in list(workers):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            continue
        name, code = workers.pop(pid), os.waitstatus_to_exitcode(status)
        if code:
            reason = (
                f"its process died of {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"
            )
            _say(asdict(Outcome(name, "lost", reason)))


def _stop(workers: dict[int, str]) -> None:
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while workers:
        _bury(workers)
        time.sleep(POLL_S)


def _say(line: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more
        os.write(STDOUT, json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    main()
