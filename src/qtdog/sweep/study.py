"""A study file: which runs to make, as methods times a grid or a random search, expanded to configurations."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from qtdog.core.config import Config
from qtdog.core.config_io import Tree, build_config, is_method_preset, load_preset, preset_plugins
from qtdog.core.errors import ConfigError, DataError, unknown
from qtdog.core.progress import Progress
from qtdog.core.random import numpy_stream
from qtdog.core.registry import HyperParameter
from qtdog.core.safe_text import MAX_YAML_BYTES, parse_yaml, read_text
from qtdog.data.dataset import DomainDataset
from qtdog.runs.finished import Labels, Scalar
from qtdog.training.build import OBJECTIVES, STEP_RULES
from qtdog.training.plugins import load_plugins, with_plugins
from qtdog.training.protocol import dataset_layer, resolve

# Short names of what nearly every study varies.
SHORT = {"target": "data.target", "trial": "data.trial", "seed": "train.seed"}
SPAN = re.compile(r"(\d+)\.\.(\d+)")


def expand_values(values: Any) -> Any:
    """Return the list that a grid's value means: itself, one value as a list, or the numbers of "0..9".

    Example:
        >>> expand_values("0..2"), expand_values(["art", "photo"]), expand_values(7)
        ([0, 1, 2], ['art', 'photo'], [7])
    """
    if isinstance(values, list):
        return values
    span = SPAN.fullmatch(values) if isinstance(values, str) else None
    return list(range(int(span[1]), int(span[2]) + 1)) if span else [values]


Values = Annotated[list[Scalar | list[Scalar] | dict[str, Scalar]], BeforeValidator(expand_values), Field(min_length=1)]
Axes = dict[str, Values]


class Part(BaseModel):
    """Base of the parts of a study file: unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StudyLayer(Part):
    """Presets, and on top of them single values by dotted key."""

    presets: list[str] = Field(default=[], description="names of presets, or YAML files; later ones win")
    set: dict[str, Any] = Field(default={}, description="values by section.key, on top of the presets")


class Search(Part):
    """A random search: `n` draws, the first of them the defaults."""

    n: int = Field(ge=1, le=100_000, description="draws; draw 0 is the defaults")
    seed: int = Field(default=0, ge=0, description="of the draws")
    over: list[Literal["objective", "step_rule", "lr", "batch_size", "weight_decay"]] = Field(
        default=["objective", "step_rule", "lr", "batch_size"], description="what is drawn"
    )


class Method(StudyLayer):
    """One method: what it sets beside the base, and axes of its own."""

    about: str = Field(default="", description="what differs from what the name says; printed below its table")
    title: str = Field(default="", description="its name in a table of expected values, where not its own")
    grid: Axes = Field(default={}, description="axes that the method has instead of the study's, or besides")
    search: Search | None = None


class Ensemble(Part):
    """A model made of finished runs of one method that differ in their seed."""

    name: str
    method: str
    kind: Literal["eoq", "eoa", "ensemble", "diwa", "soup"]
    members: Annotated[list[list[int]], BeforeValidator(lambda given: _groups(given))]
    pick: Literal["uniform", "greedy"] = Field(default="uniform", description="which members diwa and soup average")
    grid: Axes = Field(default={}, description="only for these values of the method's axes")


def _groups(given: Any) -> Any:
    """Return groups of seeds: one group if `given` is a list of numbers or a span."""
    values = expand_values(given)
    return values if all(isinstance(value, list) for value in values) else [values]


# What a study may say that is known of its methods, and what tables call it.
EXPECTED_MEASURES = {
    "unseen": "unseen domain",
    "unseen_all": "unseen domain, all of it",
    "in_domain": "in domain, last 20 % of each source",
    "source": "validation split of the sources",
    "percentile_10_in": "10th percentile over known reviewers",
    "percentile_10_out": "10th percentile over unseen reviewers",
    "mean_of_five": "unseen domain, mean of five data sets",
}


def _measures(value: Any) -> Any:
    """Return values by measure: a number alone is the accuracy on the unseen domain."""
    return {"unseen": value} if isinstance(value, int | float) else value


def _known_measures(values: dict[str, float]) -> dict[str, float]:
    for name in values:
        if name.partition("/")[0] not in EXPECTED_MEASURES:
            raise ValueError(unknown("measure", name, EXPECTED_MEASURES))
    return values


# Measure, or measure/domain → accuracy in %.
ExpectedValues = Annotated[
    dict[str, float], BeforeValidator(_measures), AfterValidator(_known_measures), Field(min_length=1)
]


class StudyDataset(StudyLayer):
    """What is particular to one data set in a study of several."""

    data: str = Field(description="as --data takes it")
    methods: dict[str, StudyLayer] = Field(default={}, description="what a method has here besides")
    expected: dict[str, ExpectedValues] = Field(default={}, description="known accuracies by method and measure, %")


class Study(Part):
    """A whole study file.

    Example:
        >>> study = Study.model_validate({"name": "a", "methods": {"float": {}}, "grid": {"seed": "0..2"}})
        >>> study.grid["seed"]
        [0, 1, 2]
    """

    name: str = Field(pattern=r"^[\w.-]+$", description="of the study; letters, digits, '-', '_', '.'")
    about: str = ""
    data: str | None = Field(default=None, description="as --data takes it; the command line wins")
    plugins: list[str] = Field(default=[], description="plug-in files, beside the study or in the present folder")
    base: StudyLayer = StudyLayer()
    methods: dict[str, Method] = Field(min_length=1)
    grid: Axes = Field(default={}, description="values by section.key (or target, trial, seed): all combinations")
    search: Search | None = None
    share_prefix: bool = Field(default=False, description="train float steps that runs have in common once")
    share_averaged: bool = Field(default=False, description="train runs that differ only in their averager once")
    ensembles: list[Ensemble] = []
    order: list[Axes] = Field(default=[], description="which runs come first, by method, target, seed, …")
    expected: dict[str, ExpectedValues] = Field(default={}, description="known accuracies by method and measure, %")
    not_run: dict[str, str] = Field(default={}, description="methods with expected values that are no runs: why")
    datasets: dict[str, StudyDataset] = Field(default={}, description="the data sets that the study is made on, each")

    def on_dataset(self, name: str) -> Study:
        """Return the study on one of its data sets; `name` is one of `datasets` (KeyError if it is not).

        Example:
            >>> pacs = {"data": "pacs", "expected": {"m": 85}}
            >>> tree = {"name": "a", "methods": {"m": {}}, "datasets": {"PACS": pacs}}
            >>> study = Study.model_validate(tree).on_dataset("PACS")
            >>> study.name, study.data, study.expected
            ('a-PACS', 'pacs', {'m': {'unseen': 85.0}})
        """
        own = self.datasets[name]
        methods = {
            key: method.model_copy(update=_joined(method, own.methods[key])) if key in own.methods else method
            for key, method in self.methods.items()
        }
        changed = {
            "name": f"{self.name}-{name}",
            "data": own.data,
            "base": self.base.model_copy(update=_joined(self.base, own)),
            "methods": methods,
            "expected": self.expected | own.expected,
            "datasets": {},
        }
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _ensembles_are_of_known_methods(self) -> Study:
        names = [one.name for one in self.ensembles]
        wrong = [f"ensemble '{name}' has the name of a method" for name in names if name in self.methods]
        wrong += [f"two ensembles are called '{name}'" for name in set(names) if names.count(name) > 1]
        wrong += [
            f"ensemble '{one.name}': {unknown('method', one.method, self.methods)}"
            for one in self.ensembles
            if one.method not in self.methods
        ]
        wrong += [
            f"ensemble '{one.name}' needs two members or more in each group"
            for one in self.ensembles
            if any(len(set(group)) < 2 for group in one.members)
        ]
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @model_validator(mode="after")
    def _order_names_what_there_is(self) -> Study:
        labels = {"method", "draw"} | {name for axes in self._axes() for name in axes}
        methods = [*self.methods, *(one.name for one in self.ensembles)]
        wrong = [
            f"order: {unknown('label', name, labels)}" for rule in self.order for name in rule if name not in labels
        ]
        named = chain.from_iterable(rule.get("method", []) for rule in self.order)
        wrong += [f"order: {unknown('method', str(name), methods)}" for name in named if name not in methods]
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @model_validator(mode="after")
    def _values_are_expected_of_known_methods(self) -> Study:
        names = [*self.methods, *(one.name for one in self.ensembles), *self.not_run]
        wrong = []
        for where, part in (("", self), *self.datasets.items()):
            wrong += [f"{where} expected: {unknown('method', key, names)}" for key in part.expected if key not in names]
        for where, part in self.datasets.items():
            wrong += [
                f"{where}: {unknown('method', key, self.methods)}" for key in part.methods if key not in self.methods
            ]
        if wrong:
            raise ValueError("\n".join(line.strip() for line in wrong))
        return self

    def _axes(self) -> list[Axes]:
        return [self.grid, *(method.grid for method in self.methods.values())]


def _joined(layer: StudyLayer, upper: StudyLayer) -> dict[str, Any]:
    """Return presets and values of a layer with another one on top."""
    return {"presets": [*layer.presets, *upper.presets], "set": layer.set | upper.set}


def axis_keys(axis: str) -> list[str]:
    """Return the dotted configuration keys that an axis sets: several, with one value, if it names them with commas.

    Example:
        >>> axis_keys("target"), axis_keys("trial, seed"), axis_keys("quantizer.bits")
        (['data.target'], ['data.trial', 'train.seed'], ['quantizer.bits'])
    """
    return [SHORT.get(name.strip(), name.strip()) for name in axis.split(",")]


def read_study(path: Path) -> Study:
    """Return the study in a YAML file.

    Raises:
        ConfigError: no such file, no valid YAML, or not a study; every mistake is listed, with the nearest known name.
    """
    if not path.is_file():
        raise ConfigError(f"the study file {path} does not exist")
    try:
        tree, texts = parse_yaml(read_text(path.resolve(), MAX_YAML_BYTES, kind=ConfigError))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path} must hold keys like 'name:', 'methods:' and 'grid:'")
    try:
        study = Study.model_validate(_with_domain_names(tree, texts))
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(detail) for detail in error.errors()))
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from error
    beside = [str(path.parent / name) if (path.parent / name).is_file() else name for name in study.plugins]
    return study.model_copy(update={"plugins": beside})


def _with_domain_names(tree: Any, texts: Any, *, named: bool = False) -> Any:
    """Return the tree of a study with the names of domains as the file has them: YAML reads NO as False, 010 as 8.

    Args:
        tree: what YAML made of the file, or of a part of it.
        texts: the same with every scalar as text.
        named: whether the part holds names of domains.
    """
    if isinstance(tree, dict) and isinstance(texts, dict):
        return {
            key: _with_domain_names(value, texts.get(key, value), named="data.target" in axis_keys(str(key)))
            for key, value in tree.items()
        }
    if isinstance(tree, list) and isinstance(texts, list):
        return [_with_domain_names(one, text, named=named) for one, text in zip(tree, texts, strict=True)]
    return texts if named and tree is not None else tree


def _explain(detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        where = ".".join(path[:-1]) or "the study"
        axis = path[-1].rstrip("s")
        if axis in SHORT:
            return f"unknown key of {where} '{path[-1]}'; did you mean '{axis}', below 'grid'?"
        return unknown(f"key of {where}", path[-1], _fields(path[:-1]))
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{'.'.join(path)}: {message}" if path else message


def _fields(path: list[str]) -> list[str]:
    kinds: dict[str, type[BaseModel]] = {
        "base": StudyLayer,
        "methods": Method,
        "ensembles": Ensemble,
        "datasets": StudyDataset,
    }
    kind = kinds.get(path[0], Study) if path else Study
    return list((Search if path[-1:] == ["search"] else kind).model_fields)


# Ranges of DomainBed for data sets of photographs (Gulrajani and Lopez-Paz, ICLR 2021, appendix D.4): 10^U(-5, -3.5),
# 2^U(3, 5.5), 10^U(-6, -2).
PROTOCOL = {
    "lr": ("optimizer", "lr", HyperParameter(5e-5, "learning rate", search=(1e-5, 10**-3.5), log=True)),
    "batch_size": ("data", "batch_size", HyperParameter(32, "images per domain", search=(8, 2**5.5), log=True)),
    "weight_decay": (
        "optimizer",
        "weight_decay",
        HyperParameter(0.0, "weight decay", search=(1e-6, 1e-2), log=True),
    ),
}


def draw_values(search: Search, index: int, config: Config) -> Tree:
    """Return what draw number `index` of a search sets, as a tree for `build_config`; nothing for draw 0.

    What is drawn for a key depends on (seed, index, key) alone, so that methods get the same learning rate in the same
    draw. What the configuration sets itself for an objective or step rule is not drawn.

    Args:
        search: how many draws, and of what.
        index: of the draw.
        config: that the draw goes on top of: its objective and step rule declare the ranges.

    Raises:
        ConfigError: an unknown objective or step rule.

    Example:
        >>> from qtdog.core.config_io import build_config
        >>> coral, search = build_config([{"objective": {"name": "coral"}}]), Search(n=3, over=["objective", "lr"])
        >>> draw_values(search, 0, coral), sorted(draw_values(search, 1, coral))
        ({}, ['objective', 'optimizer'])
    """
    tree: Tree = {}
    if index == 0:
        return tree
    for name, (section, key, declared) in PROTOCOL.items():
        if name in search.over:
            tree.setdefault(section, {})[key] = declared.draw(numpy_stream(search.seed, "search", index, name))
    members: dict[str, Any] = {"objective": (OBJECTIVES, config.objective), "step_rule": (STEP_RULES, config.step_rule)}
    for axis, (registry, chosen) in members.items():
        if axis not in search.over:
            continue
        known = registry[chosen.name].HYPERPARAMETERS
        values = {
            name: declared.draw(numpy_stream(search.seed, "search", index, axis, name))
            for name, declared in known.items()
            if name not in chosen.params and (declared.search is not None or declared.choices)
        }
        if values:
            tree[axis] = {"params": chosen.params | values}
    return tree


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
    plugins = load_plugins(study_plugins(study))
    rows: list[tuple[int, tuple[int, ...], int, Point]] = []
    content = ""
    for number, (name, method) in enumerate(study.methods.items()):
        try:
            shared = _layers(study, method, dataset, source)
            build_config(shared)
        except ConfigError as error:
            errors.append(f"method '{name}': {error}")
            continue
        for place, labels, trees in _grid(study, method, dataset.domains, shared):
            labels = {"method": name} | labels
            try:
                config = resolve(build_config([*shared, *trees]), dataset, progress, content=content)
                config = with_plugins(config, plugins)
            except (ConfigError, DataError) as error:
                errors.append(f"method '{name}': {error}")
                continue
            content = config.data.content
            rank = rank_of(study.order, labels)
            rows.append((rank, place, number, Point(labels, config, rank)))
    raise_all(errors)
    return [row[-1] for row in sorted(rows, key=lambda row: row[:-1])]


def expand_without_data(study: Study, domains: Sequence[str]) -> list[tuple[Labels, Config]]:
    """Return labels and configuration of every run of a study whose data is not here: to count them.

    Args:
        study: the study.
        domains: of its data.

    Raises:
        ConfigError: a preset, key or value that there is not.
    """
    runs = []
    for name, method in study.methods.items():
        presets = [load_preset(preset) for preset in (*study.base.presets, *method.presets)]
        shared = [*presets, {"data": {"source": study.data}}, *_assigned(study.base), *_assigned(method)]
        for _, labels, trees in _grid(study, method, domains, shared):
            runs.append(({"method": name} | labels, build_config([*shared, *trees])))
    return runs


def study_plugins(study: Study) -> list[str]:
    """Return the plug-in files that a study names: itself, or in the YAML files among its presets."""
    presets = [name for layer in (study.base, *study.methods.values()) for name in layer.presets]
    return [*study.plugins, *(path for name in presets for path in preset_plugins(name))]


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
    """Return the position of the first rule that means a run; their number if none does. `target: all` means every run.

    Example:
        >>> rank_of([{"seed": [0], "target": ["art"]}, {"seed": [0, 1]}], {"seed": 0, "target": "photo"})
        1
        >>> rank_of([{"target": ["all"]}], {"seed": 0, "target": "photo"})
        0
    """

    def means(key: str, values: Sequence[Any]) -> bool:
        return labels.get(key) in values or ("data.target" in axis_keys(key) and list(values) == ["all"])

    rules = (place for place, rule in enumerate(order) if all(means(key, rule[key]) for key in rule))
    return next(rules, len(order))


def _layers(study: Study, method: Method, dataset: DomainDataset, source: str) -> list[Tree]:
    own = [load_preset(name) for name in (*study.base.presets, *method.presets)]
    first = dataset_layer(dataset, with_preset=all(map(is_method_preset, study.base.presets)))
    place = {"data": {"source": source, "skip_unreadable": bool(dataset.skipped)}}
    return [first, *own, place, *_assigned(study.base), *_assigned(method)]


def _assigned(layer: StudyLayer) -> list[Tree]:
    return [_tree(key, value) for key, value in layer.set.items()]


def _tree(key: str, value: Any) -> Tree:
    section, dot, name = key.partition(".")
    if not (dot and section and name):
        hint = f"; did you mean '{key.rstrip('s')}'?" if key.rstrip("s") in SHORT else ""
        raise ConfigError(f"'{key}' is no dotted key, like train.steps{hint}")
    return {section: {name: value}}


def _grid(
    study: Study, method: Method, domains: Sequence[str], shared: Sequence[Tree]
) -> Iterator[tuple[tuple[int, ...], Labels, list[Tree]]]:
    """Yield place, labels and trees of each combination of the axes and draws of one method.

    The place is the position on each of the study's axes, so that methods take turns.
    """
    axes = study.grid | method.grid
    choices = [[(axis, value) for value in _values(axis, axes[axis], domains)] for axis in axes]
    search = method.search or study.search
    every = itertools.product(range(search.n if search else 1), itertools.product(*choices))
    common = {axis: _values(axis, values, domains) for axis, values in study.grid.items()}
    for draw, chosen in every:
        place = tuple(values.index(value) for axis, value in chosen if value in (values := common.get(axis, [])))
        labels: Labels = {axis: value if isinstance(value, Scalar) else str(value) for axis, value in chosen}
        trees = [_tree(key, value) for axis, value in chosen for key in axis_keys(axis)]
        if search:
            labels["draw"] = draw
            trees.append(draw_values(search, draw, build_config([*shared, *trees])))
        yield (draw, *place), labels, trees


def _values(axis: str, values: Sequence[Any], domains: Sequence[str]) -> list[Any]:
    if "data.target" not in axis_keys(axis):
        return list(values)
    if misread := [value for value in values if isinstance(value, bool)]:
        raise ConfigError(f"{axis}: {misread[0]} is no name of a domain; quote it, like 'no'")
    return list(domains) if list(values) == ["all"] else [str(value) for value in values]


def label_text(labels: Labels) -> str:
    """Return labels as text for people.

    Example:
        >>> label_text({"method": "lsq", "target": "75", "seed": 0})
        'lsq target=75 seed=0'
    """
    rest = " ".join(f"{name}={value}" for name, value in labels.items() if name != "method")
    return f"{labels.get('method', '')} {rest}".strip()
