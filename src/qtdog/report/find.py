"""Finding finished runs, ensembles and DomainBed's files below the paths that a user gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qtdog.core.errors import RunError
from qtdog.report.domainbed import plain, read_domainbed
from qtdog.report.entry import Entry
from qtdog.report.read_run import read_run

DEPTH = 2  # folders of folders of runs
DOMAINBED_FILE = "results.jsonl"
# folders with the float steps that several runs share, of a sweep and of a crew: no runs of their own
SHARED_STEPS = ("prefix-*", "*-beginning")


@dataclass
class Found:
    """What was found.

    Attributes:
        entries: by name of the method, unseen domain, trial and seed: names of folders are hashes, and say nothing.
        unfinished: folders of runs that have no result yet.
    """

    entries: list[Entry] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets; spellings of one (`PACS`, `pacs`) count once, as the first entry has it."""
        names: dict[str, str] = {}
        for entry in self.entries:
            names.setdefault(plain(entry.dataset), entry.dataset)
        return list(names.values())

    def of(self, dataset: str) -> list[Entry]:
        """Return the entries of one data set."""
        return [entry for entry in self.entries if plain(entry.dataset) == plain(dataset)]


def find(paths: Sequence[Path]) -> Found:
    """Return everything finished in the paths: runs, folders of runs to any depth of two, `results.jsonl` files.

    Raises:
        RunError: a path that does not exist, files that are not what they should be, or nothing finished at all.
    """
    found = Found()
    seen: set[Path] = set()
    for given in paths:
        if not given.exists():
            raise RunError(f"{given} does not exist; give folders of runs, or DomainBed's {DOMAINBED_FILE}")
        for path in _candidates(given, DEPTH):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                _read(path, found)
    if not found.entries:
        waiting = f"; {len(found.unfinished)} runs there are not finished" if found.unfinished else ""
        listed = ", ".join(str(path) for path in paths[:3])
        raise RunError(f"no finished run, ensemble or {DOMAINBED_FILE} in {listed}{waiting}")
    found.entries.sort(key=lambda entry: (entry.method.lower(), entry.target, entry.trial, entry.seed))
    return found


def _candidates(path: Path, depth: int) -> Iterator[Path]:
    """Yield run folders and DomainBed's files at or below `path`."""
    if path.is_file() or _is_run(path):
        yield path
    else:
        if (path / DOMAINBED_FILE).is_file():
            yield path / DOMAINBED_FILE
        below = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
        for child in below if depth else ():
            yield from _candidates(child, depth - 1)


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "result.json").is_file()


def _read(path: Path, found: Found) -> None:
    if path.is_file():
        found.entries += read_domainbed(path)
        return
    entry = read_run(path)
    if entry is not None:
        found.entries.append(entry)
    elif not any(path.match(pattern) for pattern in SHARED_STEPS):
        found.unfinished.append(path)
