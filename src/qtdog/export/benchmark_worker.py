"""One model in a process of its own, which runs it on request: memory and threads are this model's alone."""

from __future__ import annotations

import contextlib
import importlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import ConfigError, ModelError, QtdogError, RunError
from qtdog.core.random import numpy_stream
from qtdog.export.benchmark_measures import Operators, Turn, count_operators, peak_memory, reset_peak_memory
from qtdog.export.packed_source import ExportInfo
from qtdog.export.runtimes import OpenModel, open_runtime

MIN_CALLS, MIN_TURN_S = 3, 0.15
ANSWER_BATCH = 32
GIVE_UP_S = 3
"""How long to wait for a process that should end, before it is killed."""
DYING_S = 60
"""How long to wait for the exit code of a process that closed its pipe: a busy machine takes its time."""
N_LAST_LINES = 5
"""Lines of a dead process's standard error that its error message repeats."""

# -P: nothing is imported from the current folder, where a timm.py or multiprocessing.py may lie. The package itself is
# found where this process found it.
WORKER = (
    sys.executable,
    "-P",
    "-c",
    f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); "
    "from qtdog.export.benchmark_worker import main; main(int(sys.argv[1]))",
)
"""The command that starts the process of a model; the number of the pipe's file descriptor is added."""

LIBRARIES = {"onnxruntime": ("onnxruntime",), "openvino": ("openvino",), "torch": ("timm",), "executorch": ()}
"""What a runtime imports, and what is not counted as memory of the model."""


@dataclass(frozen=True)
class BenchmarkJob:
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
class ModelFacts:
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


class Worker:
    """The process of one model, seen from the process that measures.

    Args:
        job: what to open.
        command: starts the process; see `WORKER`.

    Attributes:
        job: see there.
        opened: what is known of the model.

    Raises:
        RunError: the process died; the text says of what, with the end of its standard error.
        QtdogError: the model cannot be opened, or cannot take such images.
    """

    def __init__(self, job: BenchmarkJob, command: Sequence[str] = WORKER) -> None:
        self.job = job
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self._pipe, there = Pipe()
        descriptor = there.fileno()
        self._process = subprocess.Popen(
            [*command, str(descriptor)], pass_fds=[descriptor], stdin=subprocess.DEVNULL, stderr=self._stderr
        )
        there.close()
        try:
            self.opened: ModelFacts = self.ask(job)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def ask(self, request: Any) -> Any:
        """Send a request and return the answer: "time" gives a `Turn`, images give their logits; see `serve`.

        Raises:
            RunError, QtdogError: as in `Worker`.
        """
        try:
            self._pipe.send(request)
            answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise RunError(self._death()) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _death(self) -> str:
        """Say which process ended, how, and what it wrote last."""
        try:
            code = self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            code = None
        if code is None:
            ending = "closed its pipe"
        elif code < 0:
            name = signal.Signals(-code).name
            ending = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        else:
            ending = f"ended with exit code {code}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()[-N_LAST_LINES:]
        said = "It wrote nothing to standard error." if not lines else "Its last lines:\n  " + "\n  ".join(lines)
        return f"the process that ran {self.job.path} in {self.job.runtime} {ending}. {said}"

    def end(self) -> None:
        """End the process and wait for it."""
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GIVE_UP_S)
        self._process.kill()  # does nothing to one that has ended
        self._process.wait()
        self._stderr.close()


def main(descriptor: int) -> None:
    """Serve the process that holds the other end of a pipe.

    Args:
        descriptor: of the pipe, inherited.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that measures; it ends this one
    serve(Connection(descriptor))


def serve(pipe: Connection) -> None:
    """Receive a `BenchmarkJob`, open its model, send `ModelFacts`, answer requests until the other side closes it.

    The request "time" is answered by a `Turn`; images by logits, and later turns are timed on them. An error that a
    user can cause is sent in the place of an answer.
    """
    try:
        model = ModelUnderTest(pipe.recv())
        pipe.send(model.opened)
        while True:
            request = pipe.recv()
            pipe.send(model.turn() if isinstance(request, str) else model.answers(request))
    except (EOFError, ConnectionError):
        return
    except QtdogError as error:
        pipe.send(error)


class ModelUnderTest:
    """A model that is timed, inside its own process.

    Attributes:
        opened: what is known of it.

    Raises:
        ConfigError: it cannot take such images.
        FormatError, ModelError: it cannot be opened.
    """

    def __init__(self, job: BenchmarkJob) -> None:
        for name in LIBRARIES.get(job.runtime, ()):
            with contextlib.suppress(ImportError):  # opening the file says what is missing
                importlib.import_module(name)
        before = reset_peak_memory()
        started = time.perf_counter()
        self.model: OpenModel = open_runtime(job.path, runtime=job.runtime, threads=job.threads)
        open_s = time.perf_counter() - started
        preprocessing = self.model.info.preprocessing
        size = job.image_size or preprocessing.image_size
        rng = numpy_stream(0, "bench")
        self.images: npt.NDArray[np.uint8] = rng.integers(
            0, 256, (job.batch, size, size, preprocessing.channels), dtype=np.uint8
        )
        self.batch, self.place = job.batch, 0
        self._warm_up(job)
        peak = peak_memory()
        # the kernel's counters are exact to some pages only: a model may fit into memory that was free already
        self.opened = ModelFacts(self.model.info, size, open_s, peak, max(peak - before, 0), _operators(self.model))

    def _warm_up(self, job: BenchmarkJob) -> None:
        try:
            for _ in range(MIN_CALLS):
                self.model.run(self.images)
        except Exception as error:  # each runtime has errors of its own
            size, own = self.images.shape[1], self.model.info.preprocessing.image_size
            said = str(error).strip().splitlines()[0][:200]
            text = f"{job.path} cannot run in {job.runtime} on {job.batch} images of {size} pixels: {said}"
            raise ConfigError(f"{text}. It was made for {own} pixels") from error

    def turn(self) -> Turn:
        """Time some calls. A first one is not timed: it brings the model back to the processor's cache."""
        self.model.run(self._next())
        seconds: list[float] = []
        cpu_started = time.process_time()
        while len(seconds) < MIN_CALLS or sum(seconds) < MIN_TURN_S:
            images = self._next()
            started = time.perf_counter()
            self.model.run(images)
            seconds.append(time.perf_counter() - started)
        return Turn(tuple(seconds), time.process_time() - cpu_started)

    def answers(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return logits (n, n_classes); keep the images for timing."""
        self.images = np.resize(images, (max(len(images), self.batch), *images.shape[1:]))  # repeats a small set
        names = self.model.info.outputs
        found = [self.model.run(images[k : k + ANSWER_BATCH]) for k in range(0, len(images), ANSWER_BATCH)]
        parts = [dict(zip(names, outputs, strict=True)) for outputs in found]
        return np.concatenate([np.asarray(part["logits"]) for part in parts])

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
