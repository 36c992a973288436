"""Damage run folders, archives, weights files and images at random, with an eye to their structure, and read them.

    python tests/stress/hostile_inputs.py runs --count 10000
    python tests/stress/hostile_inputs.py archives --count 10000
    python tests/stress/hostile_inputs.py weights --count 2000
    python tests/stress/hostile_inputs.py images --count 5000

Model files have `tests/packing/test_hostile_files.py` (QTDOG_HOSTILE_INPUTS=5600: 50,400 of them). What is read must be
sound, or refused by an error of qtdog's that names the file. It is a fault when an input ends in another error, takes
longer than five seconds or more memory than the bound, starts a process, writes outside of its folder, or when a secret
beside the folder reaches the page. Inputs are seeded, so that a fault's number repeats it.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from qtdog.core.errors import QtdogError
from qtdog.data.archive import unpack
from qtdog.data.decode import decode
from qtdog.models.weights import read_weight_file
from qtdog.report.html import PageOptions, build_page
from qtdog.report.inputs import find_analyses
from qtdog.report.render import render
from qtdog.report.tables import numbers_csv, summary_table
from qtdog.runs.aggregate import aggregate
from qtdog.runs.find import find_runs
from qtdog.runs.index import ask, refresh
from qtdog.runs.selection import SELECTIONS
from qtdog.sweep.journal import merge_folders

MAX_SECONDS = 5.0
MAX_GROWTH_KIB = 400_000  # over all inputs of one kind: the largest alone, and what the allocator keeps
SECRET = "a secret of this machine"
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "x", "0.5", "../../secret", "/etc/passwd", "\0", "\x1b[31m", "=1+1", "\ud800", "x" * 5000, "</script><img src=x>",
    [], {}, [[[[]]]], [1] * 200, {"a": {"b": {}}}, [None], {"": None}, {"accuracy": "1"},
)  # fmt: skip
NESTED = (
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" + "[]," * 600_000 + "[]]",
    "&a [*a]",
    "a: &a [x,x]\nb: [*a,*a]",
    "9" * 5000,
)


def alter(tree: Any, rng: random.Random) -> None:
    """Change one statement somewhere in a JSON tree: replace, remove, rename or add."""
    while True:
        inner = [one for one in (tree.values() if isinstance(tree, dict) else tree) if isinstance(one, dict | list)]
        if not any(inner) or rng.random() < 0.3:
            break
        tree = rng.choice([one for one in inner if one])
    value = copy.deepcopy(rng.choice(VALUES))
    if isinstance(tree, list):
        if tree:
            tree[rng.randrange(len(tree))] = value
        return
    key = rng.choice(list(tree)) if tree else "x"
    how = rng.randrange(4)
    if how == 0:
        tree[str(value)[:50]] = tree.pop(key, value)
    elif how == 1:
        tree.pop(key, None)
    else:
        tree[key if how == 2 else rng.choice(["x", "", "step", "members", "__class__"])] = value


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return other bytes: cut, flipped, overwritten, doubled, or shuffled."""
    if not content:
        return rng.randbytes(rng.randint(0, 40))
    begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
    how = rng.randrange(5)
    if how == 0:
        return content[:begin]
    if how == 1:
        changed = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if how == 2:
        noise = rng.choice([rng.randbytes(16), bytes(16), b"\xff" * 16])
        return content[:begin] + noise + content[begin + 16 :]
    return content[:begin] + content[end:] if how == 3 else content[:end] + content[begin:]


class Kind(ABC):
    """One kind of input."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @abstractmethod
    def make(self, rng: random.Random) -> None:
        """Put a hostile input in its place."""

    @abstractmethod
    def read(self) -> None:
        """Read it as the program does; raises QtdogError if it is refused."""


class Runs(Kind):
    """Two runs, an ensemble, a study's names, an index and an analysis; a few files are damaged, or are no files."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        made = runpy.run_path(str(Path(__file__).parents[1] / "report" / "made_runs.py"))
        self.sound, self.root = place / "sound", place / "runs"
        made["make_run"](self.sound / "a", train={"seed": 0})
        made["make_run"](self.sound / "b", train={"seed": 1}, quantizer={"name": "none"})
        made["make_ensemble"](self.sound / "eoq", [self.sound / "a", self.sound / "b"])
        made["make_domainbed"](self.sound / "old" / "results.jsonl") if "make_domainbed" in made else None
        (self.sound / "b" / "diagnosis.json").write_text('{"text": "it fell to chance"}')
        (self.sound / "b" / "model.safetensors").write_bytes(b"x")
        (self.sound / ".sweep" / "studies").mkdir(parents=True)
        labels = {"a": [{"method": "lsq", "target": "photo", "seed": 0}]}
        (self.sound / ".sweep" / "studies" / "s.json").write_text(json.dumps(labels))
        (self.sound / ".sweep" / "failed").mkdir()
        (self.sound / ".sweep" / "failed" / "b.json").write_text('{"reason": "no space"}')
        self._add_analysis()
        refresh(self.sound)
        self.files = [path for path in sorted(self.sound.rglob("*")) if path.is_file()]
        (place / "secret").write_text(SECRET)

    def _add_analysis(self) -> None:
        folder = self.sound / "analysis"
        folder.mkdir()
        content = {"kind": "flatness", "title": "t", "runs": [{"label": "a"}], "notes": ["n"], "data": ["f.csv"]}
        content |= {"numbers": [{"run": "a", "gamma": 1.0, "flatness": None}], "figures": ["f.png"]}
        (folder / "analysis.json").write_text(json.dumps(content))
        (folder / "f.csv").write_text("run\n")
        Image.new("L", (2, 2)).save(folder / "f.png")

    def make(self, rng: random.Random) -> None:
        """Copy the sound folder and damage one to three of its files."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.sound, self.root)
        for file in rng.sample(self.files, rng.randint(1, 3)):
            self._damage(self.root / file.relative_to(self.sound), rng)

    def _damage(self, file: Path, rng: random.Random) -> None:
        how, content = rng.random(), file.read_bytes()
        if how < 0.55 and file.suffix in (".json", ".yaml", ".jsonl"):
            file.write_text(self._altered(content.decode(), file.suffix, rng), errors="surrogatepass")
        elif how < 0.7:
            file.write_bytes(damaged(content, rng))
        elif how < 0.75:
            file.write_text(rng.choice(NESTED))
        elif how < 0.8:
            file.write_bytes(b"")
        else:
            file.unlink()
            self._put_no_file(file, rng)

    @staticmethod
    def _altered(text: str, suffix: str, rng: random.Random) -> str:
        lines = text.splitlines() if suffix == ".jsonl" else [text]
        place = rng.randrange(len(lines))
        tree = yaml.safe_load(lines[place]) if suffix == ".yaml" else json.loads(lines[place])
        for _ in range(rng.randint(1, 3)):
            alter(tree, rng)
        lines[place] = yaml.safe_dump(tree) if suffix == ".yaml" else json.dumps(tree)
        return "\n".join(lines) + "\n"

    def _put_no_file(self, file: Path, rng: random.Random) -> None:
        how = rng.randrange(5)
        if how == 0:
            file.symlink_to(self.place / "secret")
        elif how == 1:
            file.symlink_to("/dev/zero")
        elif how == 2:
            os.mkfifo(file)
        elif how == 3:
            file.mkdir()

    def read(self) -> None:
        """Table in every format, page, index, and merge into an empty folder; none may see the secret."""
        found = find_runs([self.root])
        for name in found.datasets:
            made = [aggregate(found.of(name), one) for one in SELECTIONS]
            filled = [numbers for numbers in made if numbers.rows]
            tables = [summary_table(numbers) for numbers in filled]
            shown = "".join([numbers_csv(filled), *(render(tables, kind) for kind in ("text", "markdown", "latex"))])
            assert SECRET not in shown
        options = PageOptions(self.place / "page.html", analyses=find_analyses([self.root], found.damaged))
        page = build_page(found, options)
        assert SECRET not in page
        assert "YSBzZWNyZXQg" not in page, "the secret is in the page, in base64"
        assert SECRET not in "".join(found.damaged)
        assert len(ask(refresh(self.root))) >= 1
        out = self.place / "merged"
        shutil.rmtree(out, ignore_errors=True)
        merge_folders([self.root], out)
        for path in out.rglob("*"):
            assert not path.is_symlink(), path
            assert not path.is_file() or path.stat().st_size > 64 or SECRET not in path.read_text(errors="replace")


class Archives(Kind):
    """Zip and tar files, in which headers, sizes, names and kinds are altered, then bytes."""

    SUFFIXES = (".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz")
    NAMES = (
        "a",
        "a/b",
        "A",
        "../x",
        "/tmp/x",
        "c" * 300,
        "d\\..\\..\\e",
        "e\0f",
        "",
        ".",
        "f/",
        "\udcff",
        "CON",
        "g:h",
    )

    def make(self, rng: random.Random) -> None:
        """Write an archive of a few members with hostile names, kinds and headers, then damage some bytes."""
        self.file = self.place / f"x{rng.choice(self.SUFFIXES)}"
        stream = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names that are in it twice
            self._zip(stream, rng) if self.file.suffix == ".zip" else self._tar(stream, rng)
        content = stream.getvalue()
        if rng.random() < 0.6:
            content = damaged(content, rng)
        if rng.random() < 0.3 and self.file.suffix in (".zip", ".tar"):
            content = self._with_a_field(content, rng)
        self.file.write_bytes(content)
        shutil.rmtree(self.place / "out", ignore_errors=True)

    def _zip(self, stream: io.BytesIO, rng: random.Random) -> None:
        with zipfile.ZipFile(stream, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name in rng.sample(self.NAMES, rng.randint(1, 4)):
                info = zipfile.ZipInfo(name.replace("\udcff", "z") or "e")
                info.external_attr = rng.choice([0, 0, 0o100644, 0o120777, 0o020644, 0o040755]) << 16
                archive.writestr(info, bytes(rng.choice([0, 5, 5000])))

    def _tar(self, stream: io.BytesIO, rng: random.Random) -> None:
        mode: Any = "w:" + self.file.name.rpartition(".")[2].replace("tar", "")
        form = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
        with tarfile.open(fileobj=stream, mode=mode, format=form, errors="surrogateescape") as archive:
            for name in rng.sample(self.NAMES, rng.randint(1, 4)):
                info = tarfile.TarInfo(name[:90])
                info.size = rng.choice([0, 5, 5000])
                info.type = rng.choice(
                    [tarfile.REGTYPE] * 5 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"x"]
                )
                info.linkname = "../secret"
                if form == tarfile.PAX_FORMAT and rng.random() < 0.3:
                    info.pax_headers = {
                        rng.choice(["path", "size", "GNU.sparse.major", "x"]): rng.choice(["../y", "9", ""])
                    }
                archive.addfile(info, io.BytesIO(bytes(info.size)))

    @staticmethod
    def _with_a_field(content: bytes, rng: random.Random) -> bytes:
        """Overwrite a field where headers have sizes and places."""
        marks = [b"PK\1\2", b"PK\3\4", b"PK\5\6", b"ustar"]
        places = [place for mark in marks if (place := content.find(mark)) >= 0]
        if not places:
            return content
        begin = max(0, rng.choice(places) + rng.randint(-140, 46))
        value = rng.choice([b"\xff" * 4, bytes(4), b"\x80" + b"\xff" * 11, b"77777777777\0", rng.randbytes(4)])
        return content[:begin] + value + content[begin + len(value) :]

    def read(self) -> None:
        """Unpack it; all that comes out lies in the folder."""
        unpack(self.file, self.place / "out")
        for path in (self.place / "out").rglob("*"):
            assert path.is_dir() or path.is_file(), path
            assert not path.is_symlink(), path


class Code:
    """What runs a program when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        """Return the call."""
        return os.system, ("touch CODE_WAS_RUN",)


class Weights(Kind):
    """Files of torch.save and safetensors: damaged, of other objects, or with code."""

    def make(self, rng: random.Random) -> None:
        """Write one."""
        tensors: dict[str, Any] = {"a.weight": torch.zeros(3, 4), "b": torch.ones(2, dtype=torch.float64)}
        kind = rng.randrange(4)
        self.file = self.place / ("x.safetensors" if kind == 0 else rng.choice(["x.pt", "x.pth"]))
        if kind == 0:
            save_file(tensors, self.file)
        elif kind == 1:
            self.file.write_bytes(pickle.dumps(rng.choice([Code(), {"a": Code()}, {"state_dict": Code()}])))
        else:
            others = [torch.nn.Linear(2, 2), [tensors], {1: torch.zeros(2)}, {}, 3, {"state_dict": tensors}, {"a": "b"}]
            others += [{"a": Code()}, {"a": torch.zeros(2).to_sparse()}, tensors, tensors, tensors]
            torch.save(rng.choice(others), self.file, _use_new_zipfile_serialization=kind == 2)
        if rng.random() < 0.8:
            self.file.write_bytes(damaged(self.file.read_bytes(), rng))

    def read(self) -> None:
        """Read it."""
        for name, value in read_weight_file(self.file).items():
            assert isinstance(name, str)
            assert isinstance(value, torch.Tensor)


class Images(Kind):
    """Images of every format that is read, damaged."""

    FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")

    def make(self, rng: random.Random) -> None:
        """Write one."""
        pixels = np.frombuffer(rng.randbytes(24 * 20 * 3), dtype=np.uint8).reshape(24, 20, 3)
        stream = io.BytesIO()
        mode = rng.choice(["RGB", "L", "P"])
        kind = rng.choice(self.FORMATS if mode != "P" else ("PNG", "GIF"))
        Image.fromarray(pixels).convert(mode).save(stream, kind)
        self.file = self.place / f"x.{kind.lower()}"
        self.file.write_bytes(damaged(stream.getvalue(), rng))

    def read(self) -> None:
        """Decode it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = decode(self.file)
        assert pixels.dtype == np.uint8


KINDS: dict[str, type[Kind]] = {"runs": Runs, "archives": Archives, "weights": Weights, "images": Images}
watched = runpy.run_path(str(Path(__file__).with_name("watch.py")))["watched"]
HANGS_S = 120  # of wall time: nothing else ends what waits for a pipe


def hang(number: int, frame: object) -> None:
    """End what waits for ever."""
    raise TimeoutError(f"hangs: ended after {HANGS_S} s")


def run(name: str, count: int, seed: int, first: int = 0) -> list[str]:
    """Read so many inputs of a kind and return the faults."""
    faults: list[str] = []
    before, handler = 0, signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[name](Path(folder))
        for number in range(first, first + count):
            rng = random.Random(f"{seed} {name} {number}")
            kind.make(rng)
            fault, seen, started = "", list[str](), time.process_time()
            signal.alarm(HANGS_S)
            try:
                with watched(folder) as seen:
                    kind.read()
            except QtdogError as error:
                fault = "" if str(error) else f"{type(error).__name__} without a text"
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {str(error)[:150]!r}"
                fault = f"{text} at {where.filename.rpartition('/')[2]}:{where.lineno}"
            signal.alarm(0)
            seconds = time.process_time() - started
            faults += [f"{name} {number}: {one}" for one in [fault, *seen] if one]
            faults += [f"{name} {number}: {seconds:.1f} s"] if seconds > MAX_SECONDS else []
            before = before or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        faults += [f"{name}: memory grew by {growth / 1024:.0f} MiB"] if growth > MAX_GROWTH_KIB else []
        signal.signal(signal.SIGALRM, handler)
        if Path("CODE_WAS_RUN").exists():
            faults.append(f"{name}: code was run")
    return faults


def main() -> None:
    """Read the inputs of one kind, and print the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to repeat a fault")
    options = parser.parse_args()
    started = time.perf_counter()
    faults = run(options.kind, options.count, options.seed, options.first)
    seconds = time.perf_counter() - started
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.kind}: {options.count:,} inputs, {len(faults)} faults, {seconds:.0f} s, {growth:.0f} MiB at most")
    print("\n".join(faults[:40]))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
