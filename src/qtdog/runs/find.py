"""Find finished runs, ensembles and DomainBed's files below given paths, and read each into a `FinishedRun`."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtdog.core.config import AFTER_TRAINING, START_FRAC, Config
from qtdog.core.errors import ConfigError, FormatError, RunError
from qtdog.core.files import sha256_file
from qtdog.runs.domainbed import DomainBedRuns, plain, read_domainbed
from qtdog.runs.finished import (
    AVERAGED_AT_END,
    KINDS,
    Cost,
    FinishedRun,
    Selected,
    method_name,
    read_labels,
    settings_of,
    state_folder,
    study_files,
    study_method,
    unseen,
)
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import Record, check_result
from qtdog.runs.statistics import replicate


def read_run(path: Path) -> FinishedRun | None:
    """Return the finished run or ensemble in a folder; None if the run is not finished.

    Raises:
        RunError: its files are not what a run writes; the text names the file.
    """
    folder = RunFolder(path)
    result = folder.read_result()
    if result is None:
        return None
    if folder.model_file.is_file() and not folder.model_file.stat().st_size:
        raise RunError(f"{folder.model_file} is empty: the run is not finished. Go on with --resume, or leave it out")
    try:
        check_result(result)
    except ValueError as error:
        text = f"{folder.result_file} does not hold what a finished run writes: {error}"
        raise RunError(f"{text}. Leave it out") from error
    try:
        config = _config(folder)
        return _ensemble(path, result) if config is None else _run(folder, config, result)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RunError(f"{path} does not hold what a finished run writes ({error!r}). Leave it out") from error


@dataclass(frozen=True)
class RunFiles:
    """What ensembles and analyses need of one finished run.

    Attributes:
        folder: of the run.
        config: its configuration.
        result: what it measured (`result.json`).
        model_sha256: of its model file, which is the one that the run wrote.
    """

    folder: RunFolder
    config: Config
    result: Mapping[str, Any] = field(repr=False)
    model_sha256: str


def require_run(path: Path) -> RunFiles:
    """Return a finished run whose model file is the one that it wrote.

    Raises:
        RunError: no run folder, a run that is not finished, files that no run writes, or another model file.
        ConfigError: the folder holds an ensemble.
    """
    run = read_run(path)
    if run is not None and run.kind == "ensemble":
        raise ConfigError(f"{path} holds an ensemble; give the runs that it was made of")
    folder, config = open_run(path)
    if run is None or not folder.model_file.is_file():
        raise RunError(f"the run in {path} is not finished; go on with: qtdog train --resume --output {path}")
    sha256 = sha256_file(folder.model_file)
    if sha256 != run.result.get("model_sha256"):
        raise RunError(f"{folder.model_file} is not the file that the run wrote; train it again")
    return RunFiles(folder, config, run.result, sha256)


def open_run(path: Path) -> tuple[RunFolder, Config]:
    """Return the folder of a run and its configuration, whether it is finished or not.

    Raises:
        RunError: no folder of a run, or a configuration that cannot be read.
    """
    folder = RunFolder(path)
    if not path.is_dir():
        raise RunError(f"{path} is no folder; give the folders of runs, as 'qtdog train' wrote them")
    config = _config(folder)
    if config is None:
        raise RunError(f"{path} is no run folder (it has no config.yaml); give those that 'qtdog train' wrote")
    return folder, config


def _config(folder: RunFolder) -> Config | None:
    try:
        return folder.read_config()
    except ConfigError as error:
        raise RunError(f"{folder.config_file} cannot be read: {' '.join(str(error).split())}") from error


def _run(folder: RunFolder, config: Config, result: Mapping[str, Any]) -> FinishedRun:
    tree = config.model_dump(mode="json")
    # of a network quantized after training, the records tell what it was before
    after_training = config.quantizer.name in AFTER_TRAINING
    start = int(START_FRAC * config.train.steps) if config.start_step is None else config.start_step
    records = () if after_training else tuple(folder.read_metrics())
    target_20 = {record.seen.step: accuracy for record in records if (accuracy := _on_20(record)) is not None}
    return FinishedRun(
        kind="run",
        path=folder.path,
        dataset=_dataset(result),
        content=config.data.content,
        target=unseen(result),
        replicate=replicate([(config.data.trial, config.train.seed)]),
        method=method_name(tree),
        settings=settings_of(tree),
        selection=result["selection"],
        saved=_saved(result, target_20),
        records=records,
        records_match=config.averager.name not in AVERAGED_AT_END,
        start_step=config.start_step,
        select_from=start,
        mean_from=start,
        cost=Cost(_size(result), 1, config.train.steps, 1),
        config=config,
        result=result,
        target_20=target_20,
    )


def _on_20(record: Record) -> float | None:
    """Return the accuracy on what the whole target has beside its 80 % split; None if that is nothing."""
    parts = []
    for domain, whole in record.test.items():
        inner = record.test_in.get(domain)
        if inner is None or inner.n >= whole.n:
            return None
        parts.append((whole.accuracy * whole.n - inner.accuracy * inner.n) / (whole.n - inner.n))
    return sum(parts) / len(parts) if parts else None


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
        replicate=replicate((member["trial"], member["seed"]) for member in members),
        method=f"{title}: {method_name(tree)}" if tree else title,
        settings=settings_of(tree),
        selection=result["selection"],
        saved=_saved(result, {}),
        records=(),
        start_step=None,
        select_from=0,
        mean_from=0,
        cost=Cost(_size(result), len(members), result["training_steps"], result["inference_passes"]),
        result=result,
    )


def _dataset(result: Mapping[str, Any]) -> str:
    name = str(result.get("dataset") or "unknown")
    return f"{name} (in-domain)" if result["test_mode"] == "in-domain" else name


def _size(result: Mapping[str, Any]) -> Mapping[str, float]:
    size = _mapping(result["size"])
    int(size["bytes"])
    return size


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r} is no mapping")
    return value


def _saved(result: Mapping[str, Any], target_20: Mapping[int, float]) -> Selected:
    on_80 = list(_mapping(result.get("test_accuracy_80", {})).values())
    test_80 = sum(on_80) / len(on_80) if on_80 else None
    source, target, step = result["source_accuracy"], result["test_accuracy"], result.get("selected_step")
    score = (target if step is None else target_20.get(step, target)) if result["selection"] == "oracle" else source
    return Selected(step, source, target, test_80, score)


DEPTH = 4  # folders below a given one in which runs are looked for
DOMAINBED_FILE = "results.jsonl"
# folders with the float steps that several runs share, of a sweep and of an ensemble: no runs of their own
SHARED_STEPS = ("prefix-*", "*-beginning")
SMALL_FILES = ("config.yaml", "metrics.jsonl", "result.json", "diagnosis.json")


@dataclass
class RunSet:
    """What lies in some folders.

    Attributes:
        runs: by name of the method, unseen domain, trial and seed: names of folders are hashes, and say nothing.
        unfinished: folders of runs that have no result yet.
        left_out: reason → number of lines or runs that were passed over.
        damaged: a sentence for each run or file that is not what it should be, with its path.
    """

    runs: list[FinishedRun] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets; spellings of one (`PACS`, `pacs`) count once, as the first run has it."""
        names: dict[str, str] = {}
        for run in self.runs:
            names.setdefault(plain(run.dataset), run.dataset)
        return list(names.values())

    def of(self, dataset: str) -> list[FinishedRun]:
        """Return the runs of one data set."""
        return [run for run in self.runs if plain(run.dataset) == plain(dataset)]


def find_runs(paths: Sequence[Path]) -> RunSet:
    """Return everything finished in or below the paths: runs, ensembles and `results.jsonl` files.

    What a study calls a run (`.sweep/studies` beside it) is among its `names`. A run or file that is damaged is passed
    over, and said in `damaged`.

    Raises:
        RunError: a path that does not exist, or nothing finished at all; what is damaged is listed.
    """
    folders, files = _candidates(paths)
    run_set = RunSet()
    names = StudyNames()
    for folder in folders:
        try:
            run = read_run(folder)
        except RunError as error:
            run_set.damaged.append(str(error))
            continue
        if run is not None:
            run_set.runs.append(replace(run, names=names.of(folder)))
        elif not is_shared_steps(folder):
            run_set.unfinished.append(folder)
    domainbed = _read_all_domainbed(files, run_set.damaged)
    run_set.runs += domainbed.runs
    run_set.left_out += domainbed.left_out
    if not run_set.runs:
        waiting = f"; {len(run_set.unfinished)} runs there are not finished" if run_set.unfinished else ""
        listed = ", ".join(str(path) for path in paths[:3])
        if len(run_set.damaged) == 1 and not run_set.unfinished:
            raise RunError(run_set.damaged[0])
        damaged = "".join(f"\n{line}" for line in run_set.damaged)
        raise RunError(f"no finished run, ensemble or {DOMAINBED_FILE} in {listed}{waiting}{damaged}")
    run_set.runs.sort(key=lambda run: (run.method.lower(), run.target, run.replicate.members))
    return run_set


def _read_all_domainbed(files: Sequence[Path], damaged: list[str]) -> DomainBedRuns:
    """Return what DomainBed's files hold together (their runs with two unseen domains belong to others' runs)."""
    whole = list(files)
    while True:
        try:
            return read_domainbed(*whole)
        except RunError as error:
            guilty = next((file for file in whole if str(error).startswith(f"{file}, ")), None)
            guilty = guilty or next((file for file in whole if str(error).startswith(f"{file} ")), None)
            if guilty is None:
                raise
            whole.remove(guilty)
            damaged.append(str(error))


def _candidates(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return run folders and DomainBed's files in or below the paths, each once."""
    folders: dict[Path, Path] = {}
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise RunError(f"{path} does not exist; give folders of runs, or DomainBed's {DOMAINBED_FILE}")
        for one in [path] if path.is_file() else walk(path, links=True):
            file = one if one.is_file() else one / DOMAINBED_FILE
            if one.is_dir() and is_run(one):
                folders.setdefault(one.resolve(), one)
            elif file.is_file():
                files.setdefault(file.resolve(), file)
    return list(folders.values()), list(files.values())


class StudyNames:
    """What studies call the runs of a folder, read once per folder."""

    def __init__(self) -> None:
        self._known: dict[Path, dict[str, tuple[str, ...]]] = {}

    def of(self, folder: Path) -> tuple[str, ...]:
        """Return the names of a run's method in the first study, by name, that has the run; empty if none has."""
        parent = folder.resolve().parent
        if parent not in self._known:
            self._known[parent] = self._read(parent)
        return self._known[parent].get(folder.resolve().name, ())

    @staticmethod
    def _read(parent: Path) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {}
        for file in study_files(parent):
            for name, several in read_labels(file).items():
                names.setdefault(name, tuple(dict.fromkeys(study_method(labels) for labels in several)))
        return names


def is_shared_steps(folder: Path) -> bool:
    """Return whether a folder holds float steps that several runs share, and no run of its own."""
    return any(folder.match(pattern) for pattern in SHARED_STEPS)


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run or an ensemble, finished or not."""
    return any((folder / name).is_file() for name in SMALL_FILES)


def walk(root: Path, *, links: bool = False, depth: int = DEPTH) -> Iterator[Path]:
    """Yield `root` and the folders below it, sorted; what lies in the folder of a run, or is hidden, is not looked at.

    Args:
        root: where to begin.
        links: follow links to folders.
        depth: of the folders below it.
    """
    yield root
    if depth == 0 or not root.is_dir() or is_run(root):
        return
    for child in sorted(root.iterdir()):
        if child.is_dir() and not child.name.startswith(".") and (links or not child.is_symlink()):
            yield from walk(child, links=links, depth=depth - 1)


def run_folders(root: Path) -> list[Path]:
    """Return the folders below `root` that hold a run or an ensemble, finished or not, sorted."""
    return sorted(folder for folder in walk(root) if is_run(folder))


def sweep_folders(root: Path) -> list[Path]:
    """Return the folders at or below `root` that are those of a sweep, sorted."""
    return sorted(folder for folder in walk(root) if state_folder(folder).is_dir())


EXPORTED = (".onnx", ".xml", ".bin", ".pt2", ".pte", ".h")
"""Suffixes of what `qtdog export` writes."""


def find_model(path: str | Path) -> Path:
    """Return the model file that a path means: itself, or that in a run folder.

    Raises:
        FormatError: there is none; the text says why.
    """
    path = Path(path).expanduser()
    if path.suffix in EXPORTED and path.is_file():
        raise FormatError(
            f"{path} is an exported file, which other programs run; give the packed file that it was made from "
            "(model.safetensors), or its run folder"
        )
    if not path.is_dir():
        return path
    file = path / "model.safetensors"
    if not file.is_file():
        state = "holds no model"
        if RunFolder(path).config_file.is_file():
            state = "holds a run that is not finished; go on with --resume (in Python resume=True)"
        else:
            with contextlib.suppress(StopIteration):
                state += f"; did you mean {next(path.glob('*/model.safetensors'))}?"
        raise FormatError(f"{path} {state}")
    return file
