"""Kill work before each of its file operations, or let files grow to a limit only; then do it again and compare.

    python tests/stress/kill_everywhere.py train fetch merge index export sweep
    python tests/stress/kill_everywhere.py train --full --count 30

A child process does the work. An audit hook counts its changes of files below its folder, and ends it by SIGKILL before
operation number n; with --full the system refuses to write files beyond a size instead, as a full disk does, and the
work must end with the message that says what to do. The next child, left alone, must bring what an undisturbed one
brings, bit for bit, and leave no temporary file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from qtdog.core.config_io import build_config, load_preset
from qtdog.core.errors import QtdogError
from qtdog.data.cards import CARDS, Archive
from qtdog.data.dataset import DomainSubset
from qtdog.data.digits import RotatedDigits
from qtdog.data.fetch import fetch, remember
from qtdog.runs.folder import RunFolder
from qtdog.runs.index import ask, refresh
from qtdog.sweep.merge import merge_folders
from qtdog.training.build import make_accelerator
from qtdog.training.run import RunCallbacks
from qtdog.training.run import run as train_run

TESTS = Path(__file__).parents[1]
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod")
REFUSED = 3  # exit code of a child whose work was refused by an error of qtdog's
MESSAGE = "What was there before is unchanged"
TINY = {
    "data": {"target": "none", "holdout_frac": 0.02, "batch_size": 2, "image_size": 8, "workers": 0},
    "train": {"steps": 3, "eval_every": 3, "checkpoint_every": 1},
    "quantizer": {"start_step": 1, "bits": 4},
}


class Work(ABC):
    """Something that writes files in a folder."""

    LATER = ""  # the name of a file whose remains are removed when it is written next, which the next start does not

    def __init__(self, shared: Path) -> None:
        self.shared = shared  # what all starts have in common: inputs, caches

    def begin(self, folder: Path) -> None:
        """Put into a new folder what is there before, undisturbed."""
        folder.mkdir(exist_ok=True)

    @abstractmethod
    def do(self, folder: Path) -> None:
        """Do it, or go on with it."""

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

    LATER = ".fetched.json."

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
        if not target.is_dir() or (folder / ".vlcs.fetch").is_dir():
            remember("vlcs", fetch(self.card, target))

    def counts(self, name: str) -> bool:
        """Leave out what has a date, and what a kill between the last two steps leaves to be trusted anew."""
        return not name.endswith((".lock", "origin.json", "fetched.json")) and not name.startswith(self.LATER)


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
    """A small network as ONNX, OpenVINO and a program of torch."""

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        made = runpy.run_path(str(TESTS / "export" / "conftest.py"))
        self.packed = made["make_packed"](shared / "model.safetensors", "test_resnet")

    def do(self, folder: Path) -> None:
        """Export it in each format."""
        from qtdog.export.export import export
        from qtdog.export.images import LabelledImages
        from qtdog.export.packed_source import read_packed_source

        rng = np.random.default_rng(0)
        images = LabelledImages(rng.integers(0, 256, (8, 32, 32, 3), np.uint8), rng.integers(0, 3, 8), ("a", "b"))
        for name, suffix in (("onnx", ".onnx"), ("openvino", ".xml"), ("torch", ".pt2")):
            if not (folder / f"model{suffix}.json").is_file():
                export(read_packed_source(self.packed), folder / f"model{suffix}", name, images)

    def counts(self, name: str) -> bool:
        """Leave out bytes that differ from export to export, and descriptions with times."""
        return name.endswith((".onnx", ".tmp"))


class Sweep(Work):
    """A study of two runs with shared steps, from a process of its own."""

    def do(self, folder: Path) -> None:
        """Run it with one worker."""
        from qtdog.api.studies import sweep

        study = {"name": "s", "data": "rotated-digits", "base": {"presets": ["digits"], "set": SWEPT}}
        study |= {"methods": {"lsq": {}}, "grid": {"target": ["0"], "seed": "0..1"}}
        if not (self.shared / "s.yaml").is_file():
            (self.shared / "s.yaml").write_text(yaml.safe_dump(study))
        sweep(self.shared / "s.yaml", out=folder / "runs", workers=1, progress=False)

    def counts(self, name: str) -> bool:
        """Compare the models."""
        return name.endswith(("model.safetensors", ".tmp"))


SWEPT = {
    "data.batch_size": 2,
    "data.image_size": 8,
    "train.steps": 2,
    "train.eval_every": 2,
    "quantizer.start_step": 1,
}
WORKS: dict[str, type[Work]] = {"train": Train, "fetch": Fetch, "merge": Merge, "index": Index}
LONG_WORKS: dict[str, type[Work]] = {"export": Export, "sweep": Sweep}  # by command alone
HOWS = ("kill", "full")


def child(work: Work, folder: Path, before: Callable[[Path], None]) -> tuple[int, str]:
    """Do the work in a process of its own and return its exit code and what it said."""
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
    with os.fdopen(ours, "rb") as stream:
        said = stream.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def is_change(event: str, arguments: Sequence[Any], folder: str) -> bool:
    """Return whether an audit event is a change of a file below a folder."""
    if event == "open":
        path, _, flags = arguments
        changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        path, changes = (arguments[0] if arguments else None), event in CHANGES
    return bool(changes) and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder)


def kill_before(number: int) -> Callable[[Path], None]:
    """Return what ends this process before change number `number` below the folder."""

    def install(folder: Path) -> None:
        seen, place = [0], str(folder)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if is_change(event, arguments, place):
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return install


def count_changes(report: Path) -> Callable[[Path], None]:
    """Return what keeps the number of changes so far in a file."""

    def install(folder: Path) -> None:
        handle, place, seen = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), str(folder), [0]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if is_change(event, arguments, place):
                seen[0] += 1
                os.pwrite(handle, str(seen[0]).encode(), 0)

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
    return list(range(1, n + 1)) if count >= n else sorted({1 + round(i * (n - 1) / (count - 1)) for i in range(count)})


def run(name: str, how: str, count: int, place: Path) -> list[str]:
    """Disturb a work at `count` places (0 for all) and return the faults."""
    shared = place / "shared"
    shared.mkdir()
    work = {**WORKS, **LONG_WORKS}[name](shared)
    whole = place / "whole"
    whole.mkdir()
    work.begin(whole)
    code, said = child(work, whole, count_changes(place / "n"))
    if code:
        return [f"{name}, undisturbed: exit code {code}: {said[-500:]}"]
    expected, n_changes = work.result(whole), int((place / "n").read_text())
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    faults = []
    if how == "kill":
        disturbances = {f"killed before change {n}": kill_before(n) for n in spread(n_changes, count or n_changes)}
    else:
        sizes = sorted({int(largest ** (i / (max(2, count or 30) - 1))) for i in range(count or 30)})
        disturbances = {f"files of at most {size} bytes": limit_files(size) for size in sizes}
    for number, (what, before) in enumerate(disturbances.items()):
        folder = place / f"disturbed-{number}"
        folder.mkdir()
        work.begin(folder)
        faults += [f"{name}, {what}: {fault}" for fault in disturbed(work, folder, before, expected)]
        shutil.rmtree(folder)
    DONE[name, how] = len(disturbances)
    return faults


DONE: dict[tuple[str, str], int] = {}


def disturbed(work: Work, folder: Path, before: Callable[[Path], None], expected: dict[str, str]) -> list[str]:
    """Return what is wrong after a disturbed start and an undisturbed one."""
    code, said = child(work, folder, before)
    if code not in (0, REFUSED, -signal.SIGKILL) or (code == REFUSED and MESSAGE not in said):
        return [f"exit code {code}: {said[-600:]}"]
    code, said = child(work, folder, nothing)
    if code:
        return [f"the next start ends with {code}: {said[-600:]}"]
    found = work.result(folder)
    left = [path.name for path in folder.rglob("*.tmp") if "cache" not in path.parts]
    left = [name for name in left if not (work.LATER and name.startswith(work.LATER))]
    differ = [key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)]
    return [f"differ: {sorted(differ)[:5]}"] * bool(differ) + [f"left: {left[:5]}"] * bool(left)


def main() -> None:
    """Disturb each work, and print the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="+", choices=[*WORKS, *LONG_WORKS])
    parser.add_argument("--full", action="store_true", help="limit the size of files instead of killing")
    parser.add_argument("--count", type=int, default=0, help="places; all file operations, or 30 sizes, by default")
    options = parser.parse_args()
    how, faults = ("full" if options.full else "kill"), list[str]()
    for name in options.works:
        with tempfile.TemporaryDirectory() as place:
            found = run(name, how, options.count, Path(place))
        print(f"{name}, {how}: {DONE.get((name, how), 0)} places, {len(found)} faults", flush=True)
        print("\n".join(found[:20]), flush=True)
        faults += found
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
