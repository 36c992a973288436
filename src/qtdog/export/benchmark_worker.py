"""One model in a process of its own, which runs it when it is told to: so memory and threads are this model's alone."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import ConfigError, ModelError, QtdogError
from qtdog.core.random import numpy_stream
from qtdog.export.benchmark_machine import Operators, count_operators, peak_memory, reset_peak_memory
from qtdog.export.benchmark_statistics import Turn
from qtdog.export.inference_module import ASKED
from qtdog.export.info import ExportInfo, library
from qtdog.export.runtimes import OpenModel, open_runtime

MIN_CALLS, MIN_TURN_S = 3, 0.15
ANSWER_BATCH = 32


@dataclass(frozen=True)
class Job:
    """What a worker opens.

    Attributes:
        path: the file.
        runtime: its runtime.
        threads: that it may use.
        batch: images per call.
        image_size: pixels, or None for the model's own.
    """

    path: Path
    runtime: str
    threads: int
    batch: int
    image_size: int | None


@dataclass(frozen=True)
class Opened:
    """What is known of a model once it is open and has answered.

    Attributes:
        info: what its file says.
        image_size: pixels that it is given.
        open_s: seconds that opening it took.
        peak_bytes: largest resident memory of the process.
        model_bytes: how much of it came after the libraries were loaded.
        operators: see there; None if a library that counts them is missing.
    """

    info: ExportInfo
    image_size: int
    open_s: float
    peak_bytes: int
    model_bytes: int
    operators: Operators | None


def serve(pipe: Connection, job: Job) -> None:
    """Open a model, say so, and do what is asked until the other side hangs up.

    Asked "time" it sends a `bench_stats.Turn`; given images, it sends logits and, of a cascade, how many members were
    asked, and is timed on these images from then on. An error that a user can cause is sent in the place of an answer.

    Args:
        pipe: to the process that measures.
        job: what to open.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that measures; it ends this one
    try:
        worker = _Worker(job)
        pipe.send(worker.opened)
        while True:
            request = pipe.recv()
            pipe.send(worker.turn() if isinstance(request, str) else worker.answers(request))
    except (EOFError, BrokenPipeError):
        return
    except QtdogError as error:
        pipe.send(error)


class _Worker:
    def __init__(self, job: Job) -> None:
        if job.runtime in ("onnxruntime", "openvino"):
            library(job.runtime)
        before = reset_peak_memory()
        started = time.perf_counter()
        self.model: OpenModel = open_runtime(job.path, runtime=job.runtime, threads=job.threads)
        open_s = time.perf_counter() - started
        how = self.model.info.preprocessing
        size = job.image_size or how.image_size
        rng = numpy_stream(0, "bench")
        self.images: npt.NDArray[np.uint8] = rng.integers(0, 256, (job.batch, size, size, how.channels), dtype=np.uint8)
        self.batch, self.place = job.batch, 0
        self._warm_up(job)
        peak = peak_memory()
        self.opened = Opened(self.model.info, size, open_s, peak, peak - before, _operators(self.model))

    def _warm_up(self, job: Job) -> None:
        try:
            for _ in range(MIN_CALLS):
                self.model.run(self.images)
        except Exception as error:  # each runtime has errors of its own
            size, own = self.images.shape[1], self.model.info.preprocessing.image_size
            said = str(error).strip().splitlines()[0][:200]
            text = f"{job.path} cannot run in {job.runtime} on {job.batch} images of {size} pixels: {said}"
            raise ConfigError(f"{text}. It was made for {own} pixels") from error

    def turn(self) -> Turn:
        """Time calls; a first one, that is not timed, brings the model back to the processor's cache."""
        self.model.run(self._next())
        seconds: list[float] = []
        cpu_started = time.process_time()
        while len(seconds) < MIN_CALLS or sum(seconds) < MIN_TURN_S:
            images = self._next()
            started = time.perf_counter()
            self.model.run(images)
            seconds.append(time.perf_counter() - started)
        return Turn(tuple(seconds), time.process_time() - cpu_started)

    def answers(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], float | None]:
        self.images = np.resize(images, (max(len(images), self.batch), *images.shape[1:]))  # repeats a small set
        names = self.model.info.outputs
        found = [self.model.run(images[k : k + ANSWER_BATCH]) for k in range(0, len(images), ANSWER_BATCH)]
        parts = [dict(zip(names, outputs, strict=True)) for outputs in found]
        logits = np.concatenate([np.asarray(part["logits"]) for part in parts])
        if ASKED not in names:
            return logits, None
        return logits, float(np.concatenate([np.asarray(part[ASKED]) for part in parts]).mean())

    def _next(self) -> npt.NDArray[np.uint8]:
        """Return a batch; the images come in turns."""
        if self.place + self.batch > len(self.images):
            self.place = 0
        self.place += self.batch
        return self.images[self.place - self.batch : self.place]


def _operators(model: OpenModel) -> Operators | None:
    try:
        return count_operators(model)
    except ModelError:
        return None
