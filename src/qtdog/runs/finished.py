"""One finished model as tables and reports see it, wherever it was trained; the names that it has in tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtdog.core.config import Config
from qtdog.core.errors import RunError
from qtdog.core.registry import Registry
from qtdog.core.safe_text import read_json
from qtdog.runs.record import Record
from qtdog.runs.statistics import Replicate

# What names a problem or a repetition of it, and not a method: runs that differ in nothing else share a row.
NOT_SETTINGS = (
    "data.source",
    "data.content",
    "data.target",
    "data.trial",
    "data.workers",
    "objective.teacher",
    "objective.teacher_sha256",
    "train.seed",
)

# Averagers whose average is made at the end: until then evaluations are of the raw weights.
AVERAGED_AT_END = ("swa", "swad", "bma")


@dataclass(frozen=True)
class Selected:
    """What one way to select a checkpoint gives; accuracies as fractions, None where nothing was measured.

    Attributes:
        step: of the checkpoint; None for a mean over several, or an ensemble.
        source: mean accuracy on the validation split of the source domains.
        target: accuracy on the whole unseen domain.
        target_80: accuracy on its 80 % split, which DomainBed's tables report.
        score: what a search over settings compares: for `oracle` the accuracy on the 20 % split of the unseen domain,
            for `leave-one-out` that on the source domains left out in turn, else `source`.
    """

    step: int | None
    source: float | None
    target: float | None
    target_80: float | None
    score: float | None = None

    def on(self, split: str) -> float | None:
        """Return the accuracy on the `whole` unseen domain or on its `80` % split."""
        return self.target_80 if split == "80" else self.target


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        size: bytes on disk and ratio to float32 as in `result.json`; empty if unknown.
        n_models: how many models were trained for it.
        training_steps: updates behind it; None if unknown.
        passes: forward passes per image.
    """

    size: Mapping[str, float] = field(default_factory=dict)
    n_models: int = 1
    training_steps: int | None = None
    passes: int = 1


@dataclass(frozen=True)
class FinishedRun:
    """One finished run, ensemble, or run of DomainBed.

    Attributes:
        kind: `run`, `ensemble` or `domainbed`.
        path: its folder or file.
        dataset: the data set, with its test mode if that is not the usual one.
        content: hash of the data set's content; empty if unknown.
        target: the unseen domain.
        replicate: trials (which random 20 % of each domain are held out) and seeds of training; an ensemble has those
            of its members.
        method: short name of the method, without what several settings of it differ in.
        settings: the configuration by `section.key`, without `NOT_SETTINGS`; empty if unknown.
        selection: how the checkpoint in the model file was selected.
        saved: what the model file measured; None if there is none.
        records: all evaluations; empty if there are none of this model.
        records_match: whether an evaluation is of what a run that ends there would save. It is not where an average is
            made at the end alone: until then evaluations are of the raw weights.
        start_step: the first quantized step; None in float.
        select_from: checkpoints after this step may be selected; the same for float and quantized runs.
        mean_from: the mean over evaluations takes those after this step.
        cost: size, models, steps and passes.
        config: of a run; None for an ensemble or DomainBed.
        result: the whole `result.json`; empty for DomainBed.
        target_20: by step, the accuracy on the 20 % split of the unseen domain; empty if unknown.
        left_out: by step, the mean accuracy of the source domains when each is left out in turn; empty if unknown.
        names: what a study calls the method; empty where none does.
    """

    kind: str
    path: Path
    dataset: str
    content: str
    target: str
    replicate: Replicate
    method: str
    settings: Mapping[str, Any] = field(repr=False)
    selection: str
    saved: Selected | None
    records: tuple[Record, ...] = field(repr=False)
    start_step: int | None
    select_from: int
    mean_from: int
    cost: Cost
    records_match: bool = True
    config: Config | None = field(default=None, repr=False)
    result: Mapping[str, Any] = field(default_factory=dict, repr=False)
    target_20: Mapping[int, float] = field(default_factory=dict, repr=False)
    left_out: Mapping[int, float] = field(default_factory=dict, repr=False)
    names: tuple[str, ...] = ()


def settings_of(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what makes the method of a configuration, by `section.key`.

    A float network has no grid, so of its quantizer only the name is kept. A teacher that is a file differs from target
    to target and does not count; one that is a backbone does, by its name.

    Example:
        >>> settings_of({"objective": {"teacher": "resnet50", "teacher_sha256": "f0"}})
        {'objective.teacher': 'resnet50'}
        >>> settings_of({"quantizer": {"name": "none", "bits": 7}, "train": {"steps": 5, "seed": 1}})
        {'quantizer.name': 'none', 'train.steps': 5}
    """
    tree = {section: dict(values) for section, values in config.items()}
    if tree.get("quantizer", {}).get("name") == "none":
        tree["quantizer"] = {"name": "none"}
    flat = {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
    settings = {key: value for key, value in flat.items() if key not in NOT_SETTINGS}
    teacher = _named_teacher(flat.get("objective.teacher"))
    return settings | ({"objective.teacher": teacher} if teacher else {})


def _named_teacher(teacher: object) -> str:
    """Return the name of a teacher that is a backbone; "" for a file, whose name is no part of the method."""
    text = str(teacher or "")
    return "" if text.endswith(".safetensors") else text


NO_TARGET = "no unseen domain"


def method_name(config: Mapping[str, Any]) -> str:
    """Return a short name of what a configuration trains: every axis that is not at its plainest, and the grid.

    Example:
        >>> method_name({"objective": {"name": "erm"}, "quantizer": {"name": "lsq", "bits": 7}})
        'erm + lsq 7 bit'
        >>> method_name({"objective": {"name": "coral"}, "averager": {"name": "swad"}, "quantizer": {"name": "none"}})
        'coral + swad + float'
        >>> method_name({"objective": {"name": "erm"}, "quantizer": {"name": "lsq", "bits": 7, "activation_bits": 8}})
        'erm + lsq 7 bit, activations 8 bit'
    """
    names = [config["objective"]["name"]]
    if config["objective"].get("teacher"):
        names.append(f"teacher {_named_teacher(config['objective']['teacher'])}".rstrip())
    axes = [config.get("model", {}).get("feature_layer", "none")]
    axes += [config.get(axis, {}).get("name", "none") for axis in ("step_rule", "averager")]
    return " + ".join([*names, *(name for name in axes if name not in ("none", "plain")), _grid(config["quantizer"])])


def _grid(quantizer: Mapping[str, Any]) -> str:
    if quantizer["name"] == "none":
        return "float"
    mixed = " (mixed)" if quantizer.get("layer_bits") else ""
    activations = f", activations {quantizer['activation_bits']} bit" if quantizer.get("activation_bits") else ""
    return f"{quantizer['name']} {quantizer['bits']} bit{mixed}{activations}"


def unseen(result: Mapping[str, Any]) -> str:
    """Return what a result was tested on: its unseen domain, or words for what stands in its place.

    Example:
        >>> unseen({"test_mode": "target", "target_domain": "sketch"})
        'sketch'
    """
    in_domain = result["test_mode"] == "in-domain"
    return "last 20 % of sources" if in_domain else str(result.get("target_domain") or NO_TARGET)


@dataclass(frozen=True)
class Kind:
    """One way to make a model of several.

    Attributes:
        title: for tables.
        about: one line for people.
        members: what a member must be: "quantized", "averaged", "float" or "any".
        one_model: whether the result is one network; else all members are kept and asked.
    """

    title: str
    about: str
    members: str
    one_model: bool = False


KINDS: Registry[Kind] = Registry("kind of ensemble")


KINDS.add("eoq", Kind("EoQ", "Ensemble of quantized models: argmax of the mean logits (paper, Eq. 6).", "quantized"))


KINDS.add("eoa", Kind("EoA", "Ensemble of moving averages (Arpit et al., 2022): the mean of their logits.", "averaged"))


KINDS.add("ensemble", Kind("ensemble", "Deep ensemble of float models: the mean of their logits.", "float"))


KINDS.add(
    "diwa",
    Kind("DiWA", "One float model: the mean of the members' weights (Ramé et al., 2022).", "any", one_model=True),
)


KINDS.add(
    "soup",
    Kind("soup", "One quantized model: the mean of the members' weights, quantized anew.", "quantized", one_model=True),
)


def class_counts(runs: Sequence[FinishedRun]) -> dict[tuple[str, str], dict[str, int]]:
    """Return how often images of a class of an unseen domain were answered as each class, summed over runs.

    Args:
        runs: of which those count whose `result.json` has it; what is malformed there is passed over.

    Returns:
        by (domain, class), the number of answers by class, the right one among them.
    """
    found: dict[tuple[str, str], dict[str, int]] = {}
    for run in runs:
        for domain, row in _class_rows(run.result):
            try:
                answers = {str(row["class"]): int(row["right"])}
                answers |= {str(name): int(count) for name, count in row["called"].items()}
            except (KeyError, TypeError, ValueError, AttributeError):
                continue
            if min(answers.values()) < 0 or not sum(answers.values()):
                continue
            total = found.setdefault((domain, str(row["class"])), {})
            for name, count in answers.items():
                total[name] = total.get(name, 0) + count
    return found


def _class_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    classes = result.get("classes")
    test = classes.get("test") if isinstance(classes, Mapping) else None
    for domain, rows in test.items() if isinstance(test, Mapping) else ():
        yield from ((str(domain), row) for row in (rows if isinstance(rows, list) else ()))


def risk_points(run: FinishedRun, part: str) -> dict[float, float]:
    """Return by share of answered images the share of errors among them; nothing where the result has no such curve.

    Args:
        run: finished.
        part: "test" or "source".
    """
    found = run.result.get("calibration")
    for key in (part, "risk_coverage"):
        found = found.get(key) if isinstance(found, Mapping) else None
    try:
        points = {float(coverage): float(risk) for coverage, risk in found or ()}
    except (TypeError, ValueError):
        return {}
    return points if all(0 <= value <= 1 for pair in points.items() for value in pair) else {}


Scalar = bool | int | float | str
Labels = dict[str, Scalar]  # what a study calls one of its runs: method, target, seed and its other axes
MAX_LABELS_BYTES = 64 * 2**20
REPLICATES = ("seed", "trial", "draw")


def state_folder(out: Path) -> Path:
    """Return where a sweep in the folder `out` keeps what is no run: failures, logs, plans, the index."""
    return out / ".sweep"


def study_files(out: Path) -> list[Path]:
    """Return the files with the names that studies have for the runs in a folder, sorted."""
    return sorted((state_folder(out) / "studies").glob("*.json"))


def read_labels(file: Path) -> dict[str, list[Labels]]:
    """Return by name of a run's folder its labels: method, target, seed and the other axes, for each of its names.

    Nothing if the file is not there or damaged.
    """
    try:
        content = read_json(file, max_bytes=MAX_LABELS_BYTES)
    except RunError:
        return {}
    return content if isinstance(content, dict) and all(map(_are_labels, content.values())) else {}


def _are_labels(several: object) -> bool:
    return isinstance(several, list) and all(
        isinstance(one, dict) and all(isinstance(value, bool | int | float | str) for value in one.values())
        for one in several
    )


def read_failure_reasons(out: Path) -> dict[str, str]:
    """Return why tasks of a sweep failed, by name of the task; a damaged file counts as none."""
    reasons = {}
    for file in sorted((state_folder(out) / "failed").glob("*.json")):
        try:
            reasons[file.stem] = str(read_json(file, max_bytes=MAX_LABELS_BYTES)["reason"])
        except (RunError, KeyError, TypeError, IndexError):
            continue
    return reasons


def axis_names(axis: str) -> list[str]:
    """Return the names of an axis, which may be of several keys at once."""
    return [name.strip() for name in axis.split(",")]


def study_method(labels: Mapping[str, object]) -> str:
    """Return a study's name for a method, with the values of axes that are neither target nor repetition.

    Example:
        >>> study_method({"method": "lsq", "target": "75", "seed": 1, "quantizer.bits": 4})
        'lsq bits=4'
    """
    common = {"target", *REPLICATES}
    own = [
        f"{name.rpartition('.')[2]}={value}"
        for name, value in labels.items()
        if name != "method" and not set(axis_names(name)) & common
    ]
    return " ".join([str(labels.get("method")), *own])


Settings = Mapping[str, Any]


def label_rows(runs: Sequence[FinishedRun], *, pooled: bool = False) -> dict[str, list[FinishedRun]]:
    """Return runs by row: methods in the order of their first appearance, settings of one by name.

    A run that a study names stands under each of its names.

    Args:
        runs: of one data set.
        pooled: make one row of all settings of a method.
    """
    methods: dict[str, list[FinishedRun]] = {}
    for run in runs:
        for name in run.names or (run.method,):
            methods.setdefault(name, []).append(run)
    if pooled:
        return methods
    rows: dict[str, list[FinishedRun]] = {}
    for method, group in methods.items():
        labels = setting_labels([method] * len(group), [run.settings for run in group])
        for label in sorted(set(labels)):
            rows[label] = [run for run, its in zip(group, labels, strict=True) if its == label]
    return rows


def setting_labels(methods: Sequence[str], settings: Sequence[Settings]) -> list[str]:
    """Return a label for each of several runs: its method, and what its settings differ in.

    Where a method appears with several settings, its labels say in which values they are not the most common one:
    "erm + lsq 7 bit (step_mode=raw)".

    Args:
        methods: name of the method of each.
        settings: of each, by `section.key`.

    Example:
        >>> setting_labels(["lsq", "lsq", "lsq"], [{"q.bits": 7}, {"q.bits": 7}, {"q.bits": 4}])
        ['lsq', 'lsq', 'lsq (bits=4)']
    """
    labels = list(methods)
    for method in dict.fromkeys(methods):
        indices = [index for index, name in enumerate(methods) if name == method]
        for index, text in zip(indices, _differences([settings[index] for index in indices]), strict=True):
            labels[index] = f"{method} ({text})" if text else method
    return labels


def _differences(settings: Sequence[Settings]) -> list[str]:
    keys = differing(settings)
    common = {key: Counter(value_text(one.get(key)) for one in settings).most_common(1)[0][0] for key in keys}
    texts = [{key: value_text(one.get(key)) for key in keys} for one in settings]
    return [", ".join(f"{_short(key, keys)}={text[key]}" for key in keys if text[key] != common[key]) for text in texts]


def differing(settings: Sequence[Settings]) -> list[str]:
    """Return the keys whose values are not all alike, among those that have the key.

    Example:
        >>> differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}])
        ['b']
    """
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({value_text(one[key]) for one in settings if key in one}) > 1]


def _short(key: str, keys: Sequence[str]) -> str:
    """Return a key without its section, if no other key would read the same and the name says enough."""
    last = key.rpartition(".")[2]
    alone = [other.rpartition(".")[2] for other in keys].count(last) == 1
    return last if alone and last not in ("name", "params") else key


def value_text(value: Any) -> str:
    """Return a value for people.

    Example:
        >>> value_text(5e-05), value_text([0.5, 1.0]), value_text(None), value_text({"p": 0.5})
        ('5e-05', '[0.5, 1]', 'default', '{p: 0.5}')
    """
    if value is None:
        return "default"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(value_text(one) for one in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {value_text(one)}" for key, one in value.items()) + "}"
    return str(value)
