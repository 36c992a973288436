"""From a run folder, or the folder of an ensemble, to an entry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtdog.core.config import AFTER_TRAINING, START_FRAC, Config
from qtdog.core.errors import ConfigError, RunError
from qtdog.report.entry import Cost, Entry, Outcome, settings_of
from qtdog.report.table import method_name, unseen
from qtdog.training.run_folder import RunFolder

MAX_FILE_BYTES = 64 * 1024**2  # of a result or the metrics of one run: longer is no run's


def read_run(path: Path) -> Entry | None:
    """Return the finished run or ensemble in a folder; None if the run is not finished.

    Raises:
        RunError: its files are not what a run writes; the text names the file.
    """
    folder = RunFolder(path)
    for file in (folder.result_file, folder.metrics_file, folder.config_file):
        if file.is_file() and file.stat().st_size > MAX_FILE_BYTES:
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


def _run(folder: RunFolder, config: Config, result: Mapping[str, Any]) -> Entry:
    tree = config.model_dump(mode="json")
    # of a network quantized after training, the records tell what it was before
    after_training = config.quantizer.name in AFTER_TRAINING
    default_start = int(START_FRAC * config.train.steps)
    return Entry(
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


def _ensemble(path: Path, result: Mapping[str, Any]) -> Entry:
    from qtdog.ensemble.kinds import KINDS  # brings torch, which runs alone do not need

    if "members" not in result:
        raise RunError(f"{path} has a result.json but no config.yaml, and is no ensemble either. Leave it out")
    members = result["members"]
    first = RunFolder(path / members[0]["folder"])
    config = _config(first)
    tree = {} if config is None else config.model_dump(mode="json")
    title = f"{KINDS[result['kind']].title} of {len(members)}"
    return Entry(
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


def _shipped(result: Mapping[str, Any]) -> Outcome:
    on_80 = list(result.get("test_accuracy_80", {}).values())
    test_80 = sum(on_80) / len(on_80) if on_80 else None
    return Outcome(result.get("selected_step"), result["source_accuracy"], result["test_accuracy"], test_80)
