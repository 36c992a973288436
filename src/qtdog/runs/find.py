"""Find finished runs, ensembles and DomainBed's files below given paths, and read each into an `FinishedRun`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtdog.core.config import AFTER_TRAINING, START_FRAC, Config
from qtdog.core.errors import ConfigError, RunError
from qtdog.runs.domainbed import plain, read_domainbed
from qtdog.runs.finished import KINDS, Cost, FinishedRun, Selected, method_name, settings_of, unseen
from qtdog.runs.folder import RunFolder

MAX_RUN_BYTES = 64 * 1024**2  # of a result or the metrics of one run: longer is no run's


def read_run(path: Path) -> FinishedRun | None:
    """Return the finished run or ensemble in a folder; None if the run is not finished.

    Raises:
        RunError: its files are not what a run writes; the text names the file.
    """
    folder = RunFolder(path)
    for file in (folder.result_file, folder.metrics_file, folder.config_file):
        if file.is_file() and file.stat().st_size > MAX_RUN_BYTES:
            raise RunError(f"{file} has {file.stat().st_size:,} bytes: no run writes that much. Leave it out")
    result = folder.read_result()
    if result is None:
        return None
    try:
        config = _config(folder)
        return _ensemble(path, result) if config is None else _run(folder, config, result)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(f"{path} does not hold what a finished run writes ({error!r}). Leave it out") from error


def _config(folder: RunFolder) -> Config | None:
    try:
        return folder.read_config()
    except ConfigError as error:
        raise RunError(f"{folder.config_file} cannot be read: {error}") from error


def _run(folder: RunFolder, config: Config, result: Mapping[str, Any]) -> FinishedRun:
    tree = config.model_dump(mode="json")
    # of a network quantized after training, the records tell what it was before
    after_training = config.quantizer.name in AFTER_TRAINING
    default_start = int(START_FRAC * config.train.steps)
    return FinishedRun(
        kind="run",
        path=folder.path,
        dataset=_dataset(result),
        content=config.data.content,
        target=unseen(result),
        trial=config.data.trial,
        seed=config.train.seed,
        method=method_name(tree),
        settings=settings_of(tree),
        selection=result["selection"],
        shipped=_shipped(result),
        records=() if after_training else tuple(folder.read_metrics()),
        start_step=config.start_step,
        mean_from=default_start if config.start_step is None else config.start_step,
        cost=Cost(result["size"], 1, config.train.steps, 1),
        result=result,
    )


def _ensemble(path: Path, result: Mapping[str, Any]) -> FinishedRun:
    if "members" not in result:
        raise RunError(f"{path} has a result.json but no config.yaml, and is no ensemble either. Leave it out")
    members = result["members"]
    first = RunFolder(path / members[0]["folder"])
    config = _config(first)
    tree = {} if config is None else config.model_dump(mode="json")
    title = f"{KINDS[result['kind']].title} of {len(members)}"
    return FinishedRun(
        kind="ensemble",
        path=path,
        dataset=_dataset(result),
        content="" if config is None else config.data.content,
        target=unseen(result),
        trial=members[0]["trial"],
        seed=members[0]["seed"],
        method=f"{title}: {method_name(tree)}" if tree else title,
        settings=settings_of(tree),
        selection=result["selection"],
        shipped=_shipped(result),
        records=(),
        start_step=None,
        mean_from=0,
        cost=Cost(result["size"], len(members), result["training_steps"], result["inference_passes"]),
        result=result,
    )


def _dataset(result: Mapping[str, Any]) -> str:
    name = str(result.get("dataset") or "unknown")
    return f"{name} (in-domain)" if result["test_mode"] == "in-domain" else name


def _shipped(result: Mapping[str, Any]) -> Selected:
    on_80 = list(result.get("test_accuracy_80", {}).values())
    test_80 = sum(on_80) / len(on_80) if on_80 else None
    return Selected(result.get("selected_step"), result["source_accuracy"], result["test_accuracy"], test_80)


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

    entries: list[FinishedRun] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets; spellings of one (`PACS`, `pacs`) count once, as the first entry has it."""
        names: dict[str, str] = {}
        for entry in self.entries:
            names.setdefault(plain(entry.dataset), entry.dataset)
        return list(names.values())

    def of(self, dataset: str) -> list[FinishedRun]:
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
