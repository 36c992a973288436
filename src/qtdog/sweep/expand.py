"""From a study to the configuration of every run it asks for."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qtdog.core.config import Config
from qtdog.core.config_io import Tree, build_config, load_preset
from qtdog.core.errors import ConfigError, DataError
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.sweep.search import drawn
from qtdog.sweep.study import Axes, Labels, Layer, Method, Scalar, Study, axis_keys
from qtdog.training.protocol import dataset_layer, resolve


@dataclass(frozen=True)
class Point:
    """One run that a study asks for.

    Attributes:
        labels: where it stands: method, target, seed and the study's other axes.
        config: effective.
        rank: position of the first rule of the study's order that it matches.
    """

    labels: Labels
    config: Config
    rank: int


def expand(study: Study, dataset: DomainDataset, source: str, progress: Progress = None) -> list[Point]:
    """Return every run of a study, in the order in which they are to be made.

    Runs that an earlier rule of `study.order` means come first; among equals the methods take turns, so that each
    combination of the axes is soon there for all of them.

    Args:
        study: the study.
        dataset: its data.
        source: what opens the data set, for the runs' configurations.
        progress: of hashing images.

    Raises:
        ConfigError: a preset, key or value that there is not, or that does not fit the data; all are listed.
        DataError: the data cannot be trained on.
    """
    errors: list[str] = []
    rows: list[tuple[int, tuple[int, ...], int, Point]] = []
    content = ""
    for number, (name, method) in enumerate(study.methods.items()):
        try:
            shared = _layers(study, method, dataset, source)
            build_config(shared)
        except ConfigError as error:
            errors.append(f"method '{name}': {error}")
            continue
        for place, labels, trees in _grid(study, method, dataset, shared):
            labels = {"method": name} | labels
            try:
                config = resolve(build_config([*shared, *trees]), dataset, progress, content=content)
            except (ConfigError, DataError) as error:
                errors.append(f"method '{name}': {error}")
                continue
            content = config.data.content
            rank = rank_of(study.order, labels)
            rows.append((rank, place, number, Point(labels, config, rank)))
    raise_all(errors)
    return [row[-1] for row in sorted(rows, key=lambda row: row[:-1])]


def skips_unreadable(study: Study) -> bool:
    """Return whether a study, or one of its methods, leaves out unreadable images: it then does so for all of them."""
    for method in study.methods.values():
        with contextlib.suppress(ConfigError):  # `expand` says what is wrong
            presets = [load_preset(name) for name in (*study.base.presets, *method.presets)]
            if build_config([*presets, *_assigned(study.base), *_assigned(method)]).data.skip_unreadable:
                return True
    return False


def raise_all(errors: Sequence[str]) -> None:
    """Raise one ConfigError that lists all errors, each once; nothing if there are none."""
    unique = list(dict.fromkeys(errors))
    if unique:
        head = f"{len(unique)} mistakes in the study, and nothing was started:\n" if len(unique) > 1 else ""
        raise ConfigError(head + "\n".join(unique))


def rank_of(order: Sequence[Axes], labels: Labels) -> int:
    """Return the position of the first rule that means a run; their number if none does.

    Example:
        >>> rank_of([{"seed": [0], "target": ["art"]}, {"seed": [0, 1]}], {"seed": 0, "target": "photo"})
        1
    """
    rules = (place for place, rule in enumerate(order) if all(labels.get(key) in rule[key] for key in rule))
    return next(rules, len(order))


def _layers(study: Study, method: Method, dataset: DomainDataset, source: str) -> list[Tree]:
    own = [load_preset(name) for name in (*study.base.presets, *method.presets)]
    first = dataset_layer(dataset, with_preset=not study.base.presets)
    place = {"data": {"source": source, "skip_unreadable": bool(dataset.skipped)}}
    return [first, *own, place, *_assigned(study.base), *_assigned(method)]


def _assigned(layer: Layer) -> list[Tree]:
    return [_tree(key, value) for key, value in layer.set.items()]


def _tree(key: str, value: Any) -> Tree:
    section, dot, name = key.partition(".")
    if not (dot and section and name):
        raise ConfigError(f"'{key}' is no dotted key, like train.steps")
    return {section: {name: value}}


def _grid(
    study: Study, method: Method, dataset: DomainDataset, shared: Sequence[Tree]
) -> Iterator[tuple[tuple[int, ...], Labels, list[Tree]]]:
    """Yield place, labels and trees of each combination of the axes and draws of one method.

    The place is the position on each of the study's axes, so that methods take turns.
    """
    axes = study.grid | method.grid
    choices = [[(axis, value) for value in _values(axis, axes[axis], dataset)] for axis in axes]
    search = method.search or study.search
    every = itertools.product(range(search.n if search else 1), itertools.product(*choices))
    common = {axis: _values(axis, values, dataset) for axis, values in study.grid.items()}
    for draw, chosen in every:
        place = tuple(values.index(value) for axis, value in chosen if value in (values := common.get(axis, [])))
        labels: Labels = {axis: value if isinstance(value, Scalar) else str(value) for axis, value in chosen}
        trees = [_tree(key, value) for axis, value in chosen for key in axis_keys(axis)]
        if search:
            labels["draw"] = draw
            trees.append(drawn(search, draw, build_config([*shared, *trees])))
        yield (draw, *place), labels, trees


def _values(axis: str, values: Sequence[Any], dataset: DomainDataset) -> list[Any]:
    if "data.target" not in axis_keys(axis):
        return list(values)
    return list(dataset.domains) if list(values) == ["all"] else [str(value) for value in values]


def describe(labels: Labels) -> str:
    """Return labels as text for people.

    Example:
        >>> describe({"method": "lsq", "target": "75", "seed": 0})
        'lsq target=75 seed=0'
    """
    rest = " ".join(f"{name}={value}" for name, value in labels.items() if name != "method")
    return f"{labels.get('method', '')} {rest}".strip()
