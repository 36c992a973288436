"""From presets, YAML files, command-line values and `--set` to one validated configuration, and back to YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, nearest, unknown
from qtdog.core.safe_text import MAX_YAML_BYTES, parse_yaml, read_text

Tree = dict[str, Any]
# Short name of an option (a flag of the command line, an argument of `qtdog.train`) → its section and key.
SHORT_NAMES = {
    "data": ("data", "source"),
    "target": ("data", "target"),
    "image_size": ("data", "image_size"),
    "batch_size": ("data", "batch_size"),
    "trial": ("data", "trial"),
    "backbone": ("model", "backbone"),
    "weights": ("model", "weights"),
    "objective": ("objective", "name"),
    "step_rule": ("step_rule", "name"),
    "averager": ("averager", "name"),
    "quantizer": ("quantizer", "name"),
    "bits": ("quantizer", "bits"),
    "start_step": ("quantizer", "start_step"),
    "steps": ("train", "steps"),
    "seed": ("train", "seed"),
    "lr": ("optimizer", "lr"),
    "skip_unreadable": ("data", "skip_unreadable"),
}
PRESETS = resources.files("qtdog") / "presets"
# Files that hold a table of presets: their prefix in the names. `defaults` of a table lie below each of its rows.
TABLES = {"methods": "", "paper": "paper/"}


def preset_names() -> list[str]:
    """Return the names of the presets that are saved, sorted; those of the paper's tables begin with "paper/"."""
    files = [entry.name.removesuffix(".yaml") for entry in PRESETS.iterdir() if entry.name.endswith(".yaml")]
    return sorted([*(name for name in files if name not in TABLES), *_rows()])


@cache
def _rows() -> dict[str, dict[str, Any]]:
    """Return the presets that are rows of a table: what each sets, and `about`."""
    rows: dict[str, dict[str, Any]] = {}
    for file, prefix in TABLES.items():
        table = yaml.safe_load((PRESETS / f"{file}.yaml").read_text(encoding="utf-8"))
        defaults = table.pop("defaults", {})
        for name, row in table.items():
            about = row.pop("about")
            rows[prefix + name] = merge_trees([defaults, row]) | {"about": about}
    return rows


def load_preset(name: str) -> Tree:
    """Return the tree of a shipped preset, or of a YAML file if `name` ends in .yaml or .yml.

    Raises:
        ConfigError: no such preset or file, or it is not a mapping of sections.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"configuration file {path} does not exist")
        return {key: part for key, part in _parse(_text(path), name).items() if not isinstance(part, list)}
    if name not in preset_names():
        raise ConfigError(unknown("preset", name, preset_names()))
    if name in _rows():
        return {section: dict(values) for section, values in _rows()[name].items() if section != "about"}
    return _parse((PRESETS / f"{name}.yaml").read_text(), name)


def is_method_preset(name: str) -> bool:
    """Return whether a preset is of a method alone, and goes on top of a data set's own preset."""
    return name in _rows() and not name.startswith(TABLES["paper"])


def preset_plugins(name: str) -> list[str]:
    """Return the plug-in files that a YAML file names with `plugins: [FILE.py]`, beside it or in the present folder.

    What a run wrote into its `config.yaml` (files with their hashes) names none: a received folder runs no code.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return []
    named = _parse(_text(path), name).get("plugins", {})
    if not isinstance(named, list):
        return []
    return [str(path.parent / str(one) if (path.parent / str(one)).is_file() else one) for one in named]


def preset_description(name: str) -> str:
    """Return what a shipped preset says of itself: the comment lines at its head, or `about` of a table's row."""
    if name in _rows():
        return _rows()[name]["about"]
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    return " ".join(head)


def _text(path: Path) -> str:
    return read_text(path.resolve(), MAX_YAML_BYTES, kind=ConfigError)


def _parse(text: str, name: str) -> Tree:
    try:
        tree, texts = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error
    tree = tree or {}
    is_tree = isinstance(tree, dict) and all(isinstance(part, dict) for key, part in tree.items() if key != "plugins")
    if not is_tree or not isinstance(tree.get("plugins", {}), dict | list):
        raise ConfigError(f"{name} must hold sections with keys, like 'train:' and below it 'steps: 100'")
    parts = {section: values for section, values in tree.items() if isinstance(values, dict)}
    lists = {section: values for section, values in tree.items() if isinstance(values, list)}
    return lists | {section: _with_texts(section, values, texts.get(section)) for section, values in parts.items()}


def _with_texts(section: str, values: Tree, texts: Any) -> Tree:
    """Return the values of a section, with those of text fields as the file has them.

    YAML reads NO as False and 010 as 8, and both may be names of domains.
    """
    known = texts if isinstance(texts, dict) else {}
    return {key: known.get(key, value) if is_misread(section, key, value) else value for key, value in values.items()}


def is_misread(section: str, key: str, value: Any) -> bool:
    """Return whether YAML made something else than text of a value of a text field.

    Example:
        >>> is_misread("data", "target", False), is_misread("data", "target", "art"), is_misread("train", "steps", 8)
        (True, False, False)
    """
    outer = Config.model_fields.get(section)
    field = cast(type[BaseModel], outer.annotation).model_fields.get(key) if outer else None
    return field is not None and field.annotation is str and not isinstance(value, str | list | dict | None)


def parse_assignment(text: str) -> Tree:
    """Return the tree of one `section.key=value`, the value read as YAML.

    Example:
        >>> parse_assignment("train.steps=100")
        {'train': {'steps': 100}}

    Raises:
        ConfigError: not of that form.
    """
    path, equals, value = text.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set takes section.key=value, like --set train.steps=100; got '{text}'")
    try:
        read = parse_yaml(value)[0]
    except ValueError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML: {error}") from error
    glued = [name for name, one in read.items() if one is None and ":" in str(name)] if isinstance(read, dict) else []
    if glued:
        raise ConfigError(f"--set {text}: YAML wants a space behind the colon, as in {{{glued[0].replace(':', ': ')}}}")
    return {section: {key: value.strip() if is_misread(section, key, read) else read}}


def option_tree(options: Mapping[str, Any]) -> Tree:
    """Return the tree of some options by name; those that are None are left out.

    A name is a short one (`SHORT_NAMES`), the key of one section alone (`eval_every`), a section with several keys
    (`train={"steps": 100}`), or both with a dot (`"train.steps"`).

    Raises:
        ConfigError: a name that there is not, with the nearest one, or the key of several sections.

    Example:
        >>> option_tree({"bits": 4, "eval_every": 50, "optimizer": {"schedule": "linear"}, "seed": None})
        {'quantizer': {'bits': 4}, 'train': {'eval_every': 50}, 'optimizer': {'schedule': 'linear'}}
    """
    tree: Tree = {}
    for name, value in options.items():
        if value is None:
            continue
        if name in Config.model_fields and isinstance(value, Mapping):
            tree[name] = {**tree.get(name, {}), **value}
            continue
        section, key = _place_of(name)
        tree.setdefault(section, {})[key] = value
    return tree


def _place_of(name: str) -> tuple[str, str]:
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    if "." in name:
        section, _, key = name.partition(".")
        return section, key  # `build_config` says what is wrong with it
    keys = {section: _fields([section]) for section in Config.model_fields}
    sections = [section for section, known in keys.items() if name in known]
    if len(sections) == 1:
        return sections[0], name
    if sections:
        choices = " or ".join(f"{section}.{name}" for section in sections)
        raise ConfigError(f"'{name}' is an option of several sections: say {choices}")
    known = [*SHORT_NAMES, *keys, *(key for section in keys.values() for key in section)]
    raise ConfigError(unknown("option", name, dict.fromkeys(known)))


def merge_trees(trees: Iterable[Mapping[str, Any]]) -> Tree:
    """Return one tree in which later trees override earlier ones, key by key."""
    merged: Tree = {}
    for tree in trees:
        for section, values in tree.items():
            merged[section] = {**merged.get(section, {}), **values}
    return merged


def build_config(trees: Iterable[Mapping[str, Any]]) -> Config:
    """Return the validated configuration of the merged trees.

    Raises:
        ConfigError: an unknown section, key or value (with the nearest match), or a value out of range.
    """
    try:
        return Config.model_validate(merge_trees(trees))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from error


def _explain(detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"]]
    name = ".".join(path)
    if detail["type"] == "extra_forbidden":
        known = _fields(path[:-1])
        if len(path) == 1:
            return unknown("section", path[0], known)
        return unknown(f"option in '{'.'.join(path[:-1])}'", path[-1], known)
    if detail["type"] == "literal_error":
        expected = detail.get("ctx", {}).get("expected", "")
        choices = [choice.strip(" '") for choice in expected.replace(" or ", ",").split(",")]
        close = nearest(str(detail["input"]), choices)
        hint = f"; did you mean '{close}'?" if close else ""
        return f"{name} cannot be '{detail['input']}'{hint} Choices: {', '.join(choices)}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{name}: {message} (got {detail['input']!r})" if name else message


def _fields(path: list[str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        section = cast(type[BaseModel], annotation)
    return list(section.model_fields)


def option_rows() -> list[list[str]]:
    """Return one row `section.key`, description with default, for every value of the configuration."""
    rows = []
    for section, outer in Config.model_fields.items():
        kind = cast(type[BaseModel], outer.annotation)
        for key, field in kind.model_fields.items():
            about = f"{field.description or ''} [{field.default}]".strip()
            rows.append([f"{section}.{key}", about])
    return rows


def to_yaml(config: Config) -> str:
    """Return the effective configuration as YAML, every value spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: Config, new: Config) -> list[str]:
    """Return one line `section.key: old → new` for every value that differs."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return [
        f"{section}.{key}: {before[section][key]} → {after[section][key]}"
        for section in before
        for key in before[section]
        if before[section][key] != after[section][key]
    ]
