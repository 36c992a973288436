"""A study file: which runs to make, as methods times a grid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from qtdog.core.errors import ConfigError, unknown

Scalar = bool | int | float | str
Labels = dict[str, Scalar]  # what a study calls one of its runs: method, target, seed and its other axes
# Short names of what nearly every study varies.
SHORT = {"target": "data.target", "trial": "data.trial", "seed": "train.seed"}
SPAN = re.compile(r"(\d+)\.\.(\d+)")


def spread(values: Any) -> Any:
    """Return the list that a grid's value means: itself, one value as a list, or the numbers of "0..9".

    Example:
        >>> spread("0..2"), spread(["art", "photo"]), spread(7)
        ([0, 1, 2], ['art', 'photo'], [7])
    """
    if isinstance(values, list):
        return values
    span = SPAN.fullmatch(values) if isinstance(values, str) else None
    return list(range(int(span[1]), int(span[2]) + 1)) if span else [values]


Values = Annotated[list[Scalar | list[Scalar] | dict[str, Scalar]], BeforeValidator(spread), Field(min_length=1)]
Axes = dict[str, Values]


class Part(BaseModel):
    """Base of the parts of a study file: unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Layer(Part):
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


class Method(Layer):
    """One method: what it sets beside the base, and axes of its own."""

    about: str = ""
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
    values = spread(given)
    return values if all(isinstance(value, list) for value in values) else [values]


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
    base: Layer = Layer()
    methods: dict[str, Method] = Field(min_length=1)
    grid: Axes = Field(default={}, description="values by section.key (or target, trial, seed): all combinations")
    search: Search | None = None
    share_prefix: bool = Field(default=False, description="train float steps that runs have in common once")
    share_averaged: bool = Field(default=False, description="train runs that differ only in their averager once")
    ensembles: list[Ensemble] = []
    order: list[Axes] = Field(default=[], description="which runs come first, by method, target, seed, …")

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

    def _axes(self) -> list[Axes]:
        return [self.grid, *(method.grid for method in self.methods.values())]


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
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path} must hold keys like 'name:', 'methods:' and 'grid:'")
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(detail) for detail in error.errors()))
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from error


def _explain(detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        where = ".".join(path[:-1]) or "the study"
        return unknown(f"key of {where}", path[-1], _fields(path[:-1]))
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{'.'.join(path)}: {message}" if path else message


def _fields(path: list[str]) -> list[str]:
    kinds: dict[str, type[BaseModel]] = {"base": Layer, "methods": Method, "ensembles": Ensemble}
    kind = kinds.get(path[0], Study) if path else Study
    return list((Search if path[-1:] == ["search"] else kind).model_fields)
