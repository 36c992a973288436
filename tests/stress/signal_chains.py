"""Send signals at random to `train`, `sweep` and `export`, start them again and again, and compare what comes of it.

    python tests/stress/signal_chains.py train sweep export --chains 20

A chain is one to six starts of a work that each get a signal at a random moment, SIGINT, SIGTERM, SIGHUP or SIGKILL, or
two of them (those of a sweep also go to its worker), then a start that is left alone. Its files must be those of an
undisturbed one, bit for bit, with no temporary file. It is a fault when a start ends with a traceback or another exit
code than its signal's, lives on for long, changes a file elsewhere, or takes more time or memory than its bound.
Processes are forked when everything is imported. The numbers are seeded; moments depend on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from qtdog.cli.main import main as qtdog
from qtdog.core.config_io import build_config, load_preset

KILLS = runpy.run_path(str(Path(__file__).with_name("kill_everywhere.py")))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
ENDS_S = 60.0  # after its last signal; other processes may need the cores
MAX_MORE_SECONDS = 5.0


class Command(KILLS["Work"]):
    """A command of `qtdog`."""

    @abstractmethod
    def arguments(self, folder: Path) -> list[str]:
        """Return what comes behind `qtdog`."""

    def do(self, folder: Path) -> None:
        """Run it."""
        sys.argv = ["qtdog", *self.arguments(folder)]
        qtdog()


class Train(Command):
    """Twelve updates, six of them quantized, with a checkpoint each."""

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        changes = {"data": {"target": "75", "image_size": 12, "batch_size": 2, "workers": 0}}
        changes |= {"train": {"steps": 12, "eval_every": 6, "checkpoint_every": 1}, "quantizer": {"start_step": 6}}
        self.preset = shared / "tiny.yaml"
        self.preset.write_text(yaml.safe_dump(changes))
        KILLS["make_accelerator"](build_config([load_preset("digits")]))

    def arguments(self, folder: Path) -> list[str]:
        """Return those of a run that goes on with what there is."""
        presets = ["--preset", "digits", "--preset", str(self.preset)]
        return ["train", "--data", "rotated-digits", *presets, "--out", str(folder / "run"), "--resume"]

    def counts(self, name: str) -> bool:
        """Compare the model and the network behind it."""
        return name.endswith(("model.safetensors", "network.safetensors", ".tmp"))


class Export(Command):
    """The model of such a run as ONNX."""

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        log = shared / "log"
        end = finish(start(Train(shared), shared, log, shared / "elsewhere"), log)
        assert not end.code, end.said
        self.model = shared / "run" / "model.safetensors"
        for name in KILLS["Export"].LIBRARIES:
            __import__(name)

    def arguments(self, folder: Path) -> list[str]:
        """Return those of an export that replaces what there is."""
        return ["export", str(self.model), "--output", str(folder / "model.onnx"), "--check", "20"]

    def counts(self, name: str) -> bool:
        """Compare the model; the report has its path."""
        return name.endswith((".onnx", ".tmp"))


WORKS: dict[str, Any] = {"train": Train, "sweep": KILLS["Sweep"], "export": Export}


def start(work: Any, folder: Path, log: Path, elsewhere: Path) -> int:
    """Begin a work in a process of its own and return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ["QTDOG_CACHE"] = str(folder / "cache")
        torch.set_num_threads(1)
        KILLS["count_changes"](KILLS["Count"](), elsewhere)(folder)
        work.do(folder)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KILLS["QtdogError"] as error:
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(2, KILLS["traceback"].format_exc().encode())
    finally:
        os._exit(code)


def finish(pid: int, log: Path) -> Any:
    """Wait for the end of a process; one that lives on for long is ended."""
    ends = time.monotonic() + ENDS_S
    late = ""
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() > ends and not late:
            late = f" HANGS: ended {ENDS_S:.0f} s after the last signal"
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    said = log.read_text(errors="replace") + late
    seconds = usage.ru_utime + usage.ru_stime
    return KILLS["End"](os.waitstatus_to_exitcode(status), said, seconds, usage.ru_maxrss)


def send(pid: int, number: int, rng: random.Random) -> None:
    """Send a signal to a process, or in one case of three to one of its children."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        children = psutil.Process(pid).children()
        os.kill(rng.choice(children).pid if children and rng.random() < 0.33 else pid, number)


def chain(work: Any, place: Path, seconds: float, rng: random.Random) -> tuple[list[str], list[int]]:
    """Disturb a work again and again, then let it end; return faults and the signals that were sent."""
    folder, log, elsewhere = place / "folder", place / "log", place / "elsewhere"
    folder.mkdir()
    faults, sent = [], []
    for _ in range(rng.randint(1, 6)):
        pid = start(work, folder, log, elsewhere)
        numbers = rng.choices(SIGNALS, k=rng.choice([1, 1, 1, 2]))
        for number in numbers:
            time.sleep(rng.uniform(0.0, 1.1 * seconds) / len(numbers))
            send(pid, number, rng)
        sent += numbers
        end = finish(pid, log)
        allowed = {0, *(-number for number in numbers), *(128 + number for number in numbers)}
        if end.code not in allowed or "Traceback" in end.said or "HANGS" in end.said:
            faults.append(f"{[one.name for one in numbers]}: exit code {end.code}: {end.said[-500:]}")
    faults += sorted(set(elsewhere.read_text().splitlines())) if elsewhere.is_file() else []
    return faults, sent


def run(name: str, n_chains: int, seed: int, place: Path) -> tuple[list[str], int, int]:
    """Run so many chains of a work; return faults, the number of signals and that of starts that they ended."""
    tempfile.tempdir = str(place / "tmp")
    try:
        for one in ("shared", "whole", "tmp"):
            (place / one).mkdir()
        work, log = WORKS[name](place / "shared"), place / "log"
        began = time.monotonic()
        whole = finish(start(work, place / "whole", log, place / "elsewhere"), log)
        seconds = time.monotonic() - began
        if whole.code:
            return [f"{name}, undisturbed: exit code {whole.code}: {whole.said[-500:]}"], 0, 0
        faults, n_signals = [], 0
        for number in range(n_chains):
            rng, folder = random.Random(f"{seed} {name} {number}"), place / f"chain-{number}"
            folder.mkdir()
            found, sent = chain(work, folder, seconds, rng)
            last = finish(start(work, folder / "folder", log, folder / "elsewhere"), log)
            found += [f"the last start ends with {last.code}: {last.said[-500:]}"] if last.code else []
            found += KILLS["excesses"](last, whole)
            result, expected = work.result(folder / "folder"), work.result(place / "whole")
            differ = [key for key in result.keys() | expected.keys() if result.get(key) != expected.get(key)]
            found += [f"differ: {sorted(differ)}"] if differ else []
            faults += KILLS["told"](name, f"chain {number}", found)
            n_signals += len(sent)
            shutil.rmtree(folder, ignore_errors=True)
        return faults, n_chains, n_signals
    finally:
        tempfile.tempdir = None


def main() -> None:
    """Run the chains of each work, and print the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="+", choices=list(WORKS))
    parser.add_argument("--chains", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bad = False
    for name in options.works:
        with tempfile.TemporaryDirectory() as place:
            faults, n_chains, n_signals = run(name, options.chains, options.seed, Path(place))
        print(f"{name}: {n_chains} chains, {n_signals} signals, {len(faults)} faults", flush=True)
        bad = bad or bool(faults)
    sys.exit(bad)


if __name__ == "__main__":
    main()
