"""Kill work before each of its file operations, or let files grow to a limit only; then do it again and compare.

    python tests/stress/kill_everywhere.py train fetch sweep merge index export
    python tests/stress/kill_everywhere.py train --full --count 30

A child process, forked when everything is imported, does the work. An audit hook counts the changes of files below its
folder, of its own workers too, and ends the process that is about to make change number n by SIGKILL. With --full the
system refuses to write files beyond a size instead, as a full disk does, and the work must end with the message that
says what to do. The next child, left alone, must bring what an undisturbed one brings, bit for bit, and leave no
temporary file. It is also a fault when files of two exports lie together, when a process takes five seconds of
processor time or 150 MiB of memory more than the undisturbed one, hangs, or changes a file elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import mmap
import multiprocessing
import os
import re
import resource
import runpy
import select
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from qtdog.core.config_io import build_config, load_preset
from qtdog.core.errors import QtdogError, RunError
from qtdog.data.cards import CARDS, Archive
from qtdog.data.dataset import DomainSubset
from qtdog.data.fetch import fetch, remember, work_folder
from qtdog.data.known_datasets import RotatedDigits
from qtdog.runs.folder import RunFolder
from qtdog.runs.index import ask, refresh
from qtdog.sweep.journal import merge_folders, save_labels
from qtdog.sweep.local import LocalEngine, Resources
from qtdog.sweep.plan import make_plan
from qtdog.sweep.runner import Driver, check_tasks, unfinished
from qtdog.sweep.study import Study
from qtdog.training.build import make_accelerator
from qtdog.training.run import RunCallbacks
from qtdog.training.run import run as train_run

TESTS = Path(__file__).parents[1]
WATCH = runpy.run_path(str(Path(__file__).with_name("watch.py")))
REFUSED = 3  # exit code of a child whose work was refused by an error of qtdog's
MESSAGE = "What was there before is unchanged"
MAX_MORE_SECONDS, MAX_MORE_KIB = 5.0, 150 * 1024  # than the undisturbed work takes
HANGS_S = 120.0  # of wall time; other processes may need the cores
TINY = {
    "data": {"target": "none", "holdout_frac": 0.02, "batch_size": 2, "image_size": 8, "workers": 0},
    "train": {"steps": 3, "eval_every": 3, "checkpoint_every": 1},
    "quantizer": {"start_step": 1, "bits": 4},
}


class Work(ABC):
    """Something that writes files in a folder."""

    ONE_PROCESS = False  # and seconds long: what a kill would leave is copied on the way; a refusal changes nothing
    MAIN = ""  # the file that such a work writes first

    def __init__(self, shared: Path) -> None:
        self.shared = shared  # what all starts have in common: inputs, caches

    def begin(self, folder: Path) -> None:
        """Put into a new folder what is there before, undisturbed."""
        folder.mkdir(exist_ok=True)

    @abstractmethod
    def do(self, folder: Path) -> None:
        """Do it, or go on with it."""

    def torn(self, folder: Path, whole: Path) -> str:
        """Return what is wrong with what a disturbed start left, "" for nothing; `whole` is what the work brings."""
        del folder, whole
        return ""

    def result(self, folder: Path) -> dict[str, str]:
        """Return what came of it: path → hash, without what time and place decide."""
        found = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and self.counts(name):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        return found

    def counts(self, name: str) -> bool:
        """Return whether a file is compared."""
        return not name.endswith(".lock")


class Train(Work):
    """A run of three steps with a checkpoint each."""

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self.dataset = DomainSubset(RotatedDigits(), ("0", "30"))
        make_accelerator(build_config([load_preset("digits")]))

    def do(self, folder: Path) -> None:
        """Train, with --resume."""
        config = build_config([load_preset("digits"), TINY, {"data": {"content": "x" * 64}}])
        callbacks = RunCallbacks(warn=lambda text: None)
        train_run(config, self.dataset, RunFolder(folder / "run"), resume=True, callbacks=callbacks)

    def counts(self, name: str) -> bool:
        """Compare the model; other files have times in them."""
        return name.endswith(("model.safetensors", "config.yaml", ".tmp", "network.safetensors"))


class Merge(Work):
    """Three runs into a folder that has one of them, not as far."""

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        for place, names, step in (("theirs", "abc", 4), ("ours", "a", 2)):
            for name in names:
                run = shared / place / name
                (run / "checkpoint" / f"step-{step:08d}").mkdir(parents=True)
                (run / "checkpoint" / f"step-{step:08d}" / "checkpoint.json").write_text("{}")
                (run / "config.yaml").write_text("{}")
                (run / "metrics.jsonl").write_text("x" * 5000)
        (shared / "theirs" / ".sweep" / "studies").mkdir(parents=True)
        (shared / "theirs" / ".sweep" / "studies" / "s.json").write_text('{"a": [{"method": "x"}]}')

    def begin(self, folder: Path) -> None:
        """Copy ours."""
        shutil.copytree(self.shared / "ours", folder / "ours")

    def do(self, folder: Path) -> None:
        """Merge into the copy of ours."""
        merge_folders([self.shared / "theirs"], folder / "ours")


class Fetch(Work):
    """A small data set from a server of this process."""

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self.files: dict[str, bytes] = runpy.run_path(str(TESTS / "data" / "small_archives.py"))["published"]("vlcs")
        files = self.files

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = files[self.path[1:]]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        archives = tuple(Archive(name, (f"{place}/{name}",)) for name in files)
        self.card = replace(CARDS["vlcs"], archives=archives, expected_counts=None, expected_total=None)

    def do(self, folder: Path) -> None:
        """Fetch it, unless it is there, and remember its hash."""
        os.environ["QTDOG_DATA"] = str(folder)
        target = folder / "vlcs"
        if not target.is_dir() or work_folder(target).is_dir():
            fetch(self.card, target, settle=lambda found: print(remember("vlcs", found)))

    def counts(self, name: str) -> bool:
        """Leave out what has a date."""
        return not name.endswith((".lock", "origin.json"))


class Index(Work):
    """The index of some runs; on a full disk it is made in memory."""

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        made = runpy.run_path(str(TESTS / "report" / "made_runs.py"))
        for seed in range(3):
            made["make_run"](shared / "runs" / str(seed), train={"seed": seed})

    def begin(self, folder: Path) -> None:
        """Copy the runs."""
        shutil.copytree(self.shared / "runs", folder / "runs")

    def do(self, folder: Path) -> None:
        """Bring it up to date and ask."""
        assert len(ask(refresh(folder / "runs"))) == 3

    def counts(self, name: str) -> bool:
        """Compare the runs; the index has times in it."""
        return ".sweep" not in name


class Export(Work):
    """A small network in one format, where the export of another one is already."""

    ONE_PROCESS = True
    FORMAT, MAIN, COMPANIONS = "onnx", "model.onnx", ("model.onnx.json",)
    LIBRARIES = (
        "onnx",
        "onnxscript.optimizer",
        "onnx_ir.passes.common",
        "onnxruntime",
        "torch.export",
        "torch._dynamo",
    )

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        made = runpy.run_path(str(TESTS / "export" / "conftest.py"))
        self.packed = made["make_packed"](shared / "model.safetensors", "digits_cnn")
        self.other = made["make_packed"](shared / "other.safetensors", "digits_cnn", seed=1)
        for name in self.LIBRARIES:
            importlib.import_module(name)  # once, for all children

    def begin(self, folder: Path) -> None:
        """Copy the export of another network, made by the first call."""
        old = self.shared / "old"
        if not old.is_dir():
            old.mkdir()
            self.packed, self.other = self.other, self.packed
            end = child(self, old, nothing)
            self.packed, self.other = self.other, self.packed
            assert not end.code, end.said
        shutil.copytree(old, folder, dirs_exist_ok=True)

    def do(self, folder: Path) -> None:
        """Export it."""
        from qtdog.export.export import export
        from qtdog.export.packed_source import read_packed_source

        export(read_packed_source(self.packed), folder / self.MAIN, self.FORMAT, self.images())

    def images(self) -> Any:
        """Return eight images of noise."""
        from qtdog.export.parity import LabelledImages

        rng = np.random.default_rng(0)
        return LabelledImages(rng.integers(0, 256, (8, 32, 32, 3), np.uint8), rng.integers(0, 3, 8), ("a", "b"))

    def torn(self, folder: Path, whole: Path) -> str:
        """Return which files lie beside a main file of another export."""
        main = folder / self.MAIN
        if not main.is_file():
            return ""
        source = self.shared / "old" if main.read_bytes() == (self.shared / "old" / self.MAIN).read_bytes() else whole
        names = [name for name in self.COMPANIONS if self.is_other(folder / name, source / name)]
        return f"{self.MAIN} is that of {source.name}, {names} are not" if names else ""

    def is_other(self, file: Path, expected: Path) -> bool:
        """Return whether a file is there and says something else than another one, but for paths and times."""
        if not file.is_file():
            return False
        if file.suffix != ".json":
            return file.read_bytes() != expected.read_bytes()
        found, wanted = json.loads(file.read_text()), json.loads(expected.read_text())
        return found["parity"] != wanted["parity"]

    def counts(self, name: str) -> bool:
        """Compare what is the same from export to export, without times."""
        return name.endswith((".onnx", ".bin", ".tmp", ".h"))


class ExportInt8(Export):
    """With integer activations."""

    FORMAT = "onnx-int8"


class ExportOpenVino(Export):
    """Two files, of which one names the other."""

    FORMAT, MAIN, COMPANIONS = "openvino", "model.xml", ("model.bin", "model.xml.json")
    LIBRARIES = (*Export.LIBRARIES, "openvino")


class ExportTorch(Export):
    """A program of torch."""

    FORMAT, MAIN, COMPANIONS = "torch", "model.pt2", ("model.pt2.json",)


class ExportHeader(Export):
    """A header for C."""

    FORMAT, MAIN, COMPANIONS = "c", "model.h", ("model.h.json",)
    LIBRARIES = ()


class Bundle(Export):
    """A folder of an ONNX model, a script, a description and a card."""

    FORMAT, MAIN, COMPANIONS = "onnx", "model.json", ()

    def do(self, folder: Path) -> None:
        """Write it."""
        from qtdog.export.bundle import write_bundle
        from qtdog.export.packed_source import read_packed_source

        write_bundle(read_packed_source(self.packed), folder, self.images(), name=self.FORMAT)

    def torn(self, folder: Path, whole: Path) -> str:
        """The description has the hash of the model, which the script compares."""
        del folder, whole
        return ""

    def counts(self, name: str) -> bool:
        """Leave out the card, which has times."""
        return not name.endswith(".md")


class Silent:
    """Shows nothing."""

    def show(self, progress: Any) -> None:
        pass

    def ended(self, task: Any, outcome: Any) -> None:
        pass


class Sweep(Work):
    """A study of two runs with shared float steps, one worker, forked, so that its changes are counted too."""

    SET: ClassVar = {
        "data.batch_size": 2,
        "data.image_size": 12,
        "data.holdout_frac": 0.02,
        "train.steps": 2,
        "train.eval_every": 2,
        "train.checkpoint_every": 1,
        "quantizer.start_step": 1,
    }

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        tree = {"name": "s", "data": "rotated-digits", "base": {"presets": ["digits"], "set": self.SET}}
        tree |= {"methods": {"lsq": {}, "dorefa": {"presets": ["dorefa"]}}, "grid": {"target": ["0"], "seed": 0}}
        self.plan = make_plan(Study.model_validate(tree | {"share_prefix": True}))
        make_accelerator(build_config([load_preset("digits")]))

    def do(self, folder: Path) -> None:
        """Run it, or go on with it, as `qtdog.sweep` does."""
        plan, out = self.plan, folder / "runs"
        check_tasks(unfinished(plan.tasks, out), plan.dataset)
        save_labels(plan.study.name, plan.labels, out)
        engine = LocalEngine(out, plan.source, Resources(1, 1), context=multiprocessing.get_context("fork"))
        failed = Driver(plan.tasks, out, engine, Silent(), poll_s=0.05, busy_s=0.1).run().failed
        if failed:
            raise RunError("; ".join(outcome.reason for outcome in failed.values()))

    def counts(self, name: str) -> bool:
        """Compare the models."""
        return name.endswith(("model.safetensors", ".tmp"))


WORKS: dict[str, type[Work]] = {
    "train": Train,
    "fetch": Fetch,
    "merge": Merge,
    "index": Index,
    "export-c": ExportHeader,
}
EXPORTS: dict[str, type[Work]] = {
    "export-onnx": Export,
    "export-int8": ExportInt8,
    "export-openvino": ExportOpenVino,
    "export-torch": ExportTorch,
    "export-bundle": Bundle,
}
LONG_WORKS: dict[str, type[Work]] = {"sweep": Sweep, **EXPORTS}  # seconds for each start
HOWS = ("kill", "full")


@dataclass(frozen=True)
class End:
    """How a child ended: exit code, what it said, its processor time and memory."""

    code: int
    said: str
    seconds: float
    max_kib: int


def child(work: Work, folder: Path, before: Callable[[Path], None]) -> End:
    """Do the work in a process of its own and return how it ended."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(theirs, 1)
            os.dup2(theirs, 2)
            os.close(theirs)
            os.close(ours)
            os.environ["QTDOG_CACHE"] = str(folder / "cache")
            torch.set_num_threads(1)
            before(folder)
            work.do(folder)
            code = 0
        except QtdogError as error:
            code = REFUSED
            with contextlib.suppress(OSError):
                os.write(2, str(error).encode())
        except BaseException:
            with contextlib.suppress(OSError):
                os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(theirs)
    said = all_said(ours, pid)
    _, status, usage = os.wait4(pid, 0)
    return End(os.waitstatus_to_exitcode(status), said, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)


def all_said(handle: int, pid: int) -> str:
    """Return what comes from a pipe until its end; a child that says nothing for long and lives is ended."""
    parts, ends = [], time.monotonic() + HANGS_S
    while True:
        ready = select.select([handle], [], [], max(0.0, ends - time.monotonic()))[0]
        if not ready:
            os.kill(pid, signal.SIGKILL)
            parts.append(f" HANGS: ended after {HANGS_S:.0f} s".encode())
            break
        if not (part := os.read(handle, 65536)):
            break
        parts.append(part)
    os.close(handle)
    return b"".join(parts).decode(errors="replace")


class Count:
    """A number that processes forked from this one share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def next(self) -> int:
        """Add one and return the sum."""
        value = self.value + 1
        struct.pack_into("<q", self._memory, 0, value)
        return value

    @property
    def value(self) -> int:
        """The sum."""
        return struct.unpack_from("<q", self._memory)[0]


def count_changes(count: Count, elsewhere: Path | None = None, kill_at: int = 0) -> Callable[[Path], None]:
    """Return what counts the changes below a folder, in this process and its children.

    Args:
        count: of the changes.
        elsewhere: the file in which changes of other files are listed.
        kill_at: number of the change before which the process that makes it is killed; 0 for none.
    """

    def install(folder: Path) -> None:
        place, temporary = os.path.realpath(folder), os.path.realpath(tempfile.gettempdir())

        def is_sound(path: str) -> bool:
            return path.startswith((place, temporary, "/tmp/torchinductor_")) or WATCH["is_device"](path)

        report = -1 if elsewhere is None else os.open(elsewhere, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            path = WATCH["changed_path"](event, arguments)
            if path.startswith(place):
                if count.next() == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            elif report >= 0 and (event in WATCH["STARTS"] or (path and not is_sound(path))):
                os.write(report, f"{event} {path}\n".encode())

        sys.addaudithook(hook)

    return install


def limit_files(n_bytes: int) -> Callable[[Path], None]:
    """Return what lets no file of this process grow beyond so many bytes."""

    def install(_folder: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))

    return install


def nothing(_folder: Path) -> None:
    """Disturb nothing."""


def spread(n: int, count: int) -> list[int]:
    """Return `count` numbers from 1 to n, evenly spread; all of them if there are no more."""
    return list(range(1, n + 1)) if count >= n else sorted({1 + i * (n - 1) // max(1, count - 1) for i in range(count)})


def run(name: str, how: str, count: int, place: Path) -> list[str]:
    """Disturb a work at `count` places (0 for all) and return the faults."""
    tempfile.tempdir = str(place / "tmp")  # what lies elsewhere is noticed
    try:
        return _run(name, how, count, place)
    finally:
        tempfile.tempdir = None


def _run(name: str, how: str, count: int, place: Path) -> list[str]:
    shared, whole, elsewhere = place / "shared", place / "whole", place / "elsewhere"
    for one in (shared, whole, place / "tmp"):
        one.mkdir()
    work, changes = {**WORKS, **LONG_WORKS}[name](shared), Count()
    work.begin(whole)
    end = child(work, whole, count_changes(changes, elsewhere))
    if end.code:
        return [f"{name}, undisturbed: exit code {end.code}: {end.said[-500:]}"]
    faults = [f"{name}, elsewhere: {line}" for line in sorted(set(elsewhere.read_text().splitlines()))]
    if work.ONE_PROCESS:
        (place / "states").mkdir()
        found = _copied_states(work, place, count) if how == "kill" else _refused_writes(work, place, count or 32)
        return faults + _each_state(work, name, how, place, end, found)
    if how == "kill":
        numbers = spread(changes.value, count or changes.value)
        disturbances = {f"killed before change {n}": count_changes(Count(), kill_at=n) for n in numbers}
    else:
        sizes = file_sizes(whole, count or 32)
        disturbances = {f"files of at most {size} bytes": limit_files(size) for size in sizes}
    for number, (what, before) in enumerate(disturbances.items()):
        folder = place / f"disturbed-{number}"
        folder.mkdir()
        work.begin(folder)
        faults += told(name, what, disturbed(work, folder, before, whole, end))
        shutil.rmtree(folder)
        DONE[name, how] = number + 1
    return faults


def told(name: str, what: str, faults: list[str]) -> list[str]:
    """Print faults at once, and return them."""
    found = [f"{name}, {what}: {fault}" for fault in faults]
    for fault in found:
        print(fault, file=sys.stderr, flush=True)
    return found


def _each_state(
    work: Work, name: str, how: str, place: Path, undisturbed: End, found: list[tuple[str, Path, End]]
) -> list[str]:
    """Go on in each folder of a disturbed start, and return the faults."""
    begun = place / "begun"
    work.begin(begun)
    faults, sound = [], {state_of(begun)}
    for number, (what, state, end) in enumerate(found, 1):
        wrong = wrong_end(end, undisturbed)
        if end.code == REFUSED and state_of(state) != state_of(begun):
            wrong.append("refused, and the folder has changed")
        faults += told(name, what, wrong or gone_on(work, state, place / "whole", undisturbed, sound))
        DONE[name, how] = number
    return faults


def _copied_states(work: Work, place: Path, count: int) -> list[tuple[str, Path, End]]:
    """Copy the folder before each change of a work, as a kill would leave it there."""
    folder, states = place / "copied", place / "states"
    folder.mkdir()
    work.begin(folder)
    end = child(work, folder, copy_states(states))
    assert not end.code, end.said
    n = len(list(states.iterdir()))
    return [(f"killed before change {number}", states / str(number), end) for number in spread(n, count or n)]


def _refused_writes(work: Work, place: Path, count: int) -> list[tuple[str, Path, End]]:
    """Fork a work when it begins to write, once for each size that files may have."""
    folder, states, sizes = place / "forked", place / "states", file_sizes(place / "whole", count)
    folder.mkdir()
    work.begin(folder)
    end = child(work, folder, fork_for_each(sizes, work.MAIN, states))
    assert not end.code, end.said
    assert len(list(states.iterdir())) == 2 * len(sizes), "it never began to write"
    ends = [End(**json.loads((states / f"{size}.json").read_text())) for size in sizes]
    return [(f"files of at most {size} bytes", states / str(size), end) for size, end in zip(sizes, ends, strict=True)]


def fork_for_each(sizes: list[int], main: str, states: Path) -> Callable[[Path], None]:
    """Return what forks a process when it begins to write its main file, one after the other, and keeps their ends."""

    def install(folder: Path) -> None:
        busy, places = [False], (folder, Path(tempfile.gettempdir()))

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if busy[0] or event != "open" or Path(WATCH["changed_path"](event, arguments)).name not in (main, *DRAFTS):
                return
            busy[0] = True
            for one in places:
                shutil.copytree(one, f"{one}-begun")
            for size in sizes:
                ours, theirs = os.pipe()
                pid = os.fork()
                if not pid:
                    os.dup2(theirs, 1)
                    os.dup2(theirs, 2)
                    os.close(theirs)
                    os.close(ours)
                    limit_files(size)(folder)
                    return
                os.close(theirs)
                said = all_said(ours, pid)
                _, status, usage = os.wait4(pid, 0)
                seconds = usage.ru_utime + usage.ru_stime
                end = End(os.waitstatus_to_exitcode(status), said, seconds, usage.ru_maxrss)
                (states / f"{size}.json").write_text(json.dumps(asdict(end)))
                shutil.copytree(folder, states / str(size))
                for one in places:
                    shutil.rmtree(one)
                    shutil.copytree(f"{one}-begun", one)
            os._exit(0)

        sys.addaudithook(hook)

    return install


DRAFTS = ("graph.onnx", "model.onnx")


def copy_states(states: Path) -> Callable[[Path], None]:
    """Return what copies the folder before each change."""

    def install(folder: Path) -> None:
        place, busy, count = os.path.realpath(folder), [False], Count()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if not busy[0] and WATCH["changed_path"](event, arguments).startswith(place):
                busy[0] = True
                shutil.copytree(folder, states / str(count.next()), symlinks=True)
                busy[0] = False

        sys.addaudithook(hook)

    return install


def state_of(folder: Path) -> frozenset[tuple[str, str]]:
    """Return names and content of all files, names of temporary files without their random part."""
    found = set()
    for path in folder.rglob("*"):
        if "cache" not in path.relative_to(folder).parts:
            name = re.sub(r"\.[a-z0-9_]{8}\.tmp", ".tmp", path.relative_to(folder).as_posix())
            found.add((name, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""))
    return frozenset(found)


def file_sizes(folder: Path, count: int) -> list[int]:
    """Return `count` sizes up to that of the largest file, on a logarithmic scale, as far as there are so many."""
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for n in range(count, 20 * count):
        sizes = sorted({int(largest ** (i / (n - 1))) for i in range(n)})
        if len(sizes) >= min(count, largest):
            return sizes
    return list(range(1, largest + 1))


DONE: dict[tuple[str, str], int] = {}


States = set[frozenset[tuple[str, str]]]


def disturbed(work: Work, folder: Path, before: Callable[[Path], None], whole: Path, undisturbed: End) -> list[str]:
    """Return what is wrong after a disturbed start and an undisturbed one."""
    first = child(work, folder, before)
    return wrong_end(first, undisturbed) or gone_on(work, folder, whole, undisturbed, set())


def wrong_end(end: End, undisturbed: End) -> list[str]:
    """Return what is wrong with how a disturbed start ended."""
    if end.code not in (0, REFUSED, -signal.SIGKILL) or (end.code == REFUSED and MESSAGE not in end.said):
        return [f"exit code {end.code}: {end.said[-300:]}"]
    return excesses(end, undisturbed)


def gone_on(work: Work, folder: Path, whole: Path, undisturbed: End, sound: States) -> list[str]:
    """Return what is wrong with what a disturbed start left, and with what the next one brings.

    Args:
        work: the work.
        folder: where it was disturbed.
        whole: where it was not.
        undisturbed: how that ended.
        sound: what some starts of a work in one process left, from which the next one brought what it should.
    """
    faults, state = [torn] if (torn := work.torn(folder, whole)) else [], state_of(folder)
    if work.ONE_PROCESS and state in sound:
        return faults
    end = child(work, folder, nothing)
    if end.code:
        return [*faults, f"the next start ends with {end.code}: {end.said[-300:]}"]
    found, expected = work.result(folder), work.result(whole)
    left = [path.name for path in folder.rglob("*.tmp") if "cache" not in path.parts]
    differ = [key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)]
    faults += [f"differ: {sorted(differ)[:5]}"] * bool(differ) + [f"left: {left[:5]}"] * bool(left)
    faults += excesses(end, undisturbed)
    if not faults:
        sound.add(state)
    return faults


def excesses(end: End, undisturbed: End) -> list[str]:
    """Return what a start took beyond the bounds."""
    faults = [end.said[-300:]] if "HANGS" in end.said else []
    if end.seconds - undisturbed.seconds > MAX_MORE_SECONDS:
        faults.append(f"{end.seconds:.1f} s of processor time, undisturbed {undisturbed.seconds:.1f} s")
    if end.max_kib - undisturbed.max_kib > MAX_MORE_KIB:
        faults.append(f"{end.max_kib >> 10} MiB of memory, undisturbed {undisturbed.max_kib >> 10} MiB")
    return faults


def main() -> None:
    """Disturb each work, and print the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="+", choices=[*WORKS, "export", *LONG_WORKS])
    parser.add_argument("--full", action="store_true", help="limit the size of files instead of killing")
    parser.add_argument("--count", type=int, default=0, help="places; all file operations, or 32 sizes, by default")
    options = parser.parse_args()
    how, faults = ("full" if options.full else "kill"), list[str]()
    for name in [one for work in options.works for one in ([*EXPORTS, "export-c"] if work == "export" else [work])]:
        with tempfile.TemporaryDirectory() as place:
            found = run(name, how, options.count, Path(place))
        print(f"{name}, {how}: {DONE.get((name, how), 0)} places, {len(found)} faults", flush=True)
        faults += found
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
