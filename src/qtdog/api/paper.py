"""The tables of the QT-DoG paper as shipped studies with expected values, and what their missing runs cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qtdog.api.cost import training_flops
from qtdog.core.config import Config
from qtdog.core.config_io import Tree
from qtdog.core.errors import ConfigError, DataError, unknown
from qtdog.data.cards import CARDS
from qtdog.models.text_backbones import TEXT_BACKBONES
from qtdog.sweep.expected import ExpectedRow, tasks_of_row
from qtdog.sweep.plan import Plan
from qtdog.sweep.runner import is_done
from qtdog.sweep.study import Study, expand_without_data, read_study

STUDIES = Path(__file__).parents[1] / "studies"
TRIALS = "trial, seed"  # the axis of repetitions: each has its split and its seed


@cache
def shipped_studies() -> dict[str, Study]:
    """Return the studies of the paper's tables, by name.

    Example:
        >>> list(shipped_studies())[:2]
        ['amazon', 'bits']
    """
    return {path.stem: read_study(path) for path in sorted(STUDIES.glob("*.yaml"))}


def find_study(name: str, dataset: str | None = None) -> tuple[Study, str]:
    """Return the study that a user means, on one data set, and what it calls that.

    Args:
        name: like "table01", or a study file with expected values.
        dataset: as the study or `qtdog data list` calls it, or a beginning of that; None if there is only one.

    Raises:
        ConfigError: there is no such study or data set (with the nearest match), several to choose from, or nothing is
            expected of it.

    Example:
        >>> study, dataset = find_study("table01", "terrainc")
        >>> study.name, dataset
        ('table01-TerraIncognita', 'TerraIncognita')
    """
    path = Path(name)
    shipped = shipped_studies()
    if path.suffix in (".yaml", ".yml"):
        study = read_study(path)
    elif name in shipped:
        study = shipped[name]
    else:
        raise ConfigError(unknown("table", name, shipped))
    chosen = study.data or ""
    if study.datasets:
        names = list(study.datasets)
        fitting = names if dataset is None else [one for one in names if _plain(one).startswith(_plain(dataset))]
        if not fitting:
            raise ConfigError(unknown(f"data set of {name}", str(dataset), names))
        if len(fitting) > 1:
            raise ConfigError(f"{name} has several data sets: add --dataset, one of {', '.join(fitting)}")
        chosen = fitting[0]
        study = study.on_dataset(chosen)
    if not study.expected:
        raise ConfigError(
            f"study {name} says nothing of what is expected: give each method its values below 'expected:'"
        )
    return study, chosen


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def narrow(study: Study, rows: Sequence[ExpectedRow], n_trials: int, changes: Sequence[Tree] = ()) -> Study:
    """Return the study with the runs of some rows alone.

    Args:
        study: on one data set. If it has no axis `TRIALS`, its repetitions stay.
        rows: what is wanted; the members of an ensemble come with it.
        n_trials: trials of each method and target; an ensemble has one for each member.
        changes: configuration on top of everything.
    """
    names = {row.name for row in rows}
    ensembles = [one for one in study.ensembles if one.name in names]
    needed = {one.method: max(seed for group in one.members for seed in group) + 1 for one in ensembles}
    own = {
        f"{section}.{key}": value
        for tree in changes
        for section, values in tree.items()
        for key, value in values.items()
    }
    repeats = TRIALS in study.grid
    grid = study.grid | ({TRIALS: list(range(n_trials))} if repeats else {})
    target = own.pop("data.target", None)
    if target not in (None, "all"):
        grid = grid | {"target": [target]}
    methods = {}
    for name, method in study.methods.items():
        if name in names or name in needed:
            axes = {TRIALS: list(range(max(n_trials, needed.get(name, 0))))} if repeats else {}
            methods[name] = method.model_copy(update={"set": method.set | own, "grid": method.grid | axes})
    return study.model_copy(update={"methods": methods, "ensembles": ensembles, "grid": grid})


@dataclass(frozen=True)
class PlannedRun:
    """One run of a row; a run that several rows have is there for each.

    Attributes:
        method: the row's title.
        config: effective; without the content of the data if that is not here.
        folder: where it is, or will be; None if the data is not here.
        n_sources: domains that it trains on.
        is_done: whether it is finished.
    """

    method: str
    config: Config
    folder: Path | None
    n_sources: int
    is_done: bool = False


def planned_runs(plan: Plan, out: Path, rows: Iterable[ExpectedRow], n_trials: int) -> list[PlannedRun]:
    """Return the runs of all rows that are run, in the order of the table."""
    runs = []
    for row in rows:
        names = dict.fromkeys(
            name
            for task in tasks_of_row(plan, row, n_trials)
            for name in (task.needs if task.ensemble else (task.name,))
        )
        for task in map(plan.__getitem__, names):
            config = task.config
            assert config is not None
            sources = plan.dataset.sources(config.data.target)
            runs.append(PlannedRun(row.title, config, task.folder(out), len(sources), is_done(task, out)))
    return runs


def count_runs(study: Study, rows: Iterable[ExpectedRow], n_trials: int) -> list[PlannedRun]:
    """Return the runs of all rows of a study whose data is not here.

    Raises:
        DataError: the data's card does not name its domains, and they decide how many runs there are.
    """
    card = CARDS[study.data or ""]
    if card.domains is None and "target" in study.grid and study.grid["target"] == ["all"]:
        raise DataError(f"{card.name} is not here, and its card names no domains")
    made_of = {one.name: one.method for one in study.ensembles}
    every = expand_without_data(study, card.domains or ())
    runs = []
    for row in rows:
        n_wanted = n_trials if row.members == 1 else row.members
        for labels, config in every:
            if labels["method"] == made_of.get(row.name, row.name) and config.data.trial < n_wanted:
                # of texts the seen side is the one source
                n_sources = len(set(card.domains or ("seen",)) - {config.data.target})
                runs.append(PlannedRun(row.title, config, None, n_sources))
    return runs


@dataclass(frozen=True)
class Cost:
    """What runs cost to train; evaluations, and objectives that pass more than once over a batch, come on top.

    Attributes:
        n_runs: runs.
        n_images: images (or texts) that are trained on, with repetition.
        flops: floating-point operations.
    """

    n_runs: int
    n_images: int
    flops: float

    def hours(self, tflops: float) -> float:
        """Return the hours on a device that sustains `tflops` · 10¹² operations per second.

        Example:
            >>> Cost(1, 1, 3.6e16).hours(10)
            1.0
        """
        return self.flops / (tflops * 1e12) / 3600


def cost_of(runs: Iterable[PlannedRun]) -> Cost:
    """Return what the runs cost that are not finished; a run that several rows share counts once.

    Raises:
        ModelError: as in `api.cost.training_flops`.
    """
    missing = {run.config.model_dump_json(): run for run in runs if not run.is_done}
    by_network: dict[tuple[str, int, int], float] = {}
    n_images, flops = 0, 0.0
    for run in missing.values():
        network = backbone, channels, size = _network_of(run.config)
        if network not in by_network:
            by_network[network] = training_flops(backbone, channels=channels, size=size)
        n_trained = run.config.train.steps * run.config.data.batch_size * run.n_sources
        n_images += n_trained
        flops += n_trained * by_network[network]
    return Cost(len(missing), n_images, flops)


def _network_of(config: Config) -> tuple[str, int, int]:
    card = CARDS[config.data.source] if config.data.source in list(CARDS) else None
    is_text = config.model.backbone in TEXT_BACKBONES
    size = config.data.max_tokens if is_text else config.data.image_size
    return config.model.backbone, 3 if card is None else card.channels, size
