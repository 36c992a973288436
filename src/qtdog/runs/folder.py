"""The folder of one run: configuration, metrics, checkpoints, the saved model and the result."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qtdog.core.config import Config, config_hash
from qtdog.core.config_io import build_config, differences, load_preset, to_yaml
from qtdog.core.errors import CollapseError, FolderInUseError, RunError
from qtdog.core.files import clear_disk_errors, lock_file, remove_leftovers, sha256_file, write_atomic
from qtdog.core.safe_text import parse_json, read_json, read_text, require_regular
from qtdog.runs.record import Record, check_result

MAX_RESULT_BYTES = 16 * 2**20
MAX_METRICS_BYTES = 64 * 2**20
MAX_EVALUATIONS = 50_000
MAX_LINE_ITEMS = 2**14
ASKED_TIMES = 200  # that a lock is tried while others only ask whether it is held


class RunFolder:
    """Paths and small files of a run.

    `config.yaml`, `metrics.jsonl`, `result.json`, `checkpoint/` and `model.safetensors`; after a collapse also
    `diagnosis.json`, and if images were left out `skipped.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.result_file = path / "result.json"
        self.checkpoints = path / "checkpoint"
        self.model_file = path / "model.safetensors"
        self.diagnosis_file = path / "diagnosis.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            FolderInUseError: another process holds it.
            RunError: the folder cannot be made.
        """
        with clear_disk_errors(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise RunError(f"{self.path} is a file; --output takes a folder")
            remove_leftovers(self.path.parent, self.path.name)  # may put back a folder that was being replaced
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with clear_disk_errors(self.path):
                self._take(handle)
            for place in (self.path, self.checkpoints):
                remove_leftovers(place)
            yield
        finally:
            os.close(handle)

    def _take(self, handle: int) -> None:
        try:
            if not _lock(handle):
                _require_no_owner(handle)
        except BlockingIOError as error:
            owner = os.pread(handle, 20, 0).decode().strip() or "unknown"
            text = f"run folder {self.path} is in use by process {owner}."
            raise FolderInUseError(f"{text} Wait for it or choose another --output.") from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)

    def read_config(self) -> Config | None:
        """Return the saved configuration, or None if the folder has none."""
        if not self.config_file.is_file():
            return None
        require_regular(self.config_file)
        return build_config([load_preset(str(self.config_file))])

    def claim(self, config: Config, *, resume: bool) -> None:
        """Make the folder this configuration's, unless it is already.

        Raises:
            RunError: as in `check_claim`.
        """
        self.check_claim(config, resume=resume)
        if self.read_config() is None or not self._has_begun():
            write_atomic(self.config_file, to_yaml(config))

    def check_claim(self, config: Config, *, resume: bool) -> None:
        """Check that a run of this configuration may be made here; a run that has saved nothing yet is passed over.

        Raises:
            RunError: it holds a run of another configuration (each difference is listed), an unfinished run and
                `resume` was not asked for, or files that are no run.
        """
        saved = self.read_config()
        if saved is None:
            self._refuse_foreign_files()
            return
        if not self._has_begun():
            return
        if config_hash(saved) != config_hash(config):
            changes = "\n  ".join(differences(saved, config))
            raise RunError(f"{self.path} holds a run of another configuration:\n  {changes}\nChoose another --output.")
        if resume:
            return
        result = self.read_result()
        if result is None:
            raise RunError(f"{self.path} holds an unfinished run; add --resume to go on, or choose another --output")
        if problem := self.model_problem(result):
            raise RunError(f"{problem}: add --resume to make it again, or choose another --output")

    def _has_begun(self) -> bool:
        """Return whether something was saved that another configuration would destroy."""
        return self.result_file.exists() or self.model_file.exists() or any(self.checkpoints.glob("step-*"))

    def _refuse_foreign_files(self) -> None:
        others = sorted(path.name for path in self.path.iterdir() if path.name != ".lock" and path.suffix != ".tmp")
        if others:
            raise RunError(f"{self.path} is not empty and holds no run (found {others[0]}); choose another --output")

    def keep_skipped(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Write which images were left out and why to `skipped.json`; nothing if none was."""
        if skipped:
            listed = [{"image": key, "reason": reason} for key, reason in skipped]
            write_atomic(self.path / "skipped.json", json.dumps(listed, indent=1) + "\n")

    def read_result(self) -> dict[str, Any] | None:
        """Return what `result.json` says, or None if there is none; whether the model is there is `finished_result`'s.

        Raises:
            RunError: the file is damaged.
        """
        if not self.result_file.is_file():
            return None
        try:
            result = read_json(self.result_file, max_bytes=MAX_RESULT_BYTES)
        except RunError as error:
            raise RunError(f"{error}; delete it and --resume") from error
        if not isinstance(result, dict):
            found = type(result).__name__
            raise RunError(f"{self.result_file} does not hold what a finished run writes, but a {found}. Leave it out")
        return result

    def require_result(self, result: Mapping[str, Any]) -> None:
        """Check that a result read from here is what a finished run writes, all that is shown at its end.

        Raises:
            RunError: naming the file and what is wrong.
        """
        try:
            check_result(result, shown=True)
        except ValueError as error:
            text = f"{self.result_file} does not hold what a finished run writes: {error}"
            raise RunError(f"{text}. Leave it out, or delete it and go on with --resume") from error

    def finished_result(self) -> dict[str, Any] | None:
        """Return the result of a finished run: its model file is there, and the very one that the run wrote.

        Raises:
            RunError: `result.json` is damaged.
        """
        result = self.read_result()
        return None if result is None or self.model_problem(result) else result

    def model_problem(self, result: Mapping[str, Any]) -> str:
        """Return what is wrong with the model file of a finished run; empty if nothing is."""
        if not self.model_file.is_file():
            return f"{self.model_file} is missing"
        if not self.model_file.stat().st_size:
            return f"{self.model_file} is empty"
        written = result.get("model_sha256")
        if isinstance(written, str) and sha256_file(self.model_file) != written:
            return f"{self.model_file} is not the file that the run wrote"
        return ""

    @contextlib.contextmanager
    def diagnosis(self) -> Iterator[None]:
        """Write `diagnosis.json` if the block ends in a CollapseError, which goes on."""
        try:
            yield
        except CollapseError as error:
            write_atomic(self.diagnosis_file, json.dumps({"text": str(error)} | error.report, indent=1))
            raise

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`, durably."""
        with clear_disk_errors(self.metrics_file), self.metrics_file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def rewrite_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Make `metrics.jsonl` hold just these lines: what came after the checkpoint will be measured again."""
        write_atomic(self.metrics_file, "".join(json.dumps(line) + "\n" for line in lines))

    def read_metrics(self) -> list[Record]:
        """Return the evaluations so far; a last line that a crash cut off is left out.

        Raises:
            RunError: another line is none that a run writes.
        """
        if not self.metrics_file.is_file():
            return []
        lines = read_text(self.metrics_file, MAX_METRICS_BYTES).splitlines()
        if len(lines) > MAX_EVALUATIONS:
            raise RunError(f"{self.metrics_file} is damaged: {len(lines):,} evaluations, no run makes that many")
        records = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(Record.from_json(parse_json(line, max_items=MAX_LINE_ITEMS)))
            except ValueError as error:
                if number < len(lines):
                    raise RunError(f"{self.metrics_file} is damaged: line {number}: {error}") from error
        return records


def _lock(handle: int) -> bool:
    """Take the exclusive lock of a file; wait for those that hold a shared one, which only ask whether it is locked.

    Returns:
        whether the file system knows locks.

    Raises:
        BlockingIOError: another process holds the exclusive lock.
    """
    for _ in range(ASKED_TIMES):
        try:
            return lock_file(handle)
        except BlockingIOError:
            lock_file(handle, shared=True)
            fcntl.flock(handle, fcntl.LOCK_UN)
        time.sleep(0.01)
    return lock_file(handle)


def _require_no_owner(handle: int) -> None:
    """Where the file system knows no locks, the number of the process that holds the folder stands for one.

    Raises:
        BlockingIOError: that process lives, on this machine.
    """
    text = os.pread(handle, 20, 0).decode(errors="replace").strip()
    if text.isdigit() and int(text) != os.getpid() and _lives(int(text)):
        raise BlockingIOError(f"process {text} holds it")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def last_line(file: Path) -> dict[str, Any]:
    """Return the last whole line of a metrics file; {} if there is none."""
    if not file.is_file():
        return {}
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 20_000))
        lines = stream.read().splitlines()
    for line in reversed(lines):
        try:
            found = parse_json(line.decode(), max_items=MAX_LINE_ITEMS)
        except ValueError:
            continue
        return found if isinstance(found, dict) else {}
    return {}
