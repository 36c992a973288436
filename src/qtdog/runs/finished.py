"""One finished model as tables and reports see it, wherever it was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtdog.core.config import Config
from qtdog.core.registry import Registry
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
    Kind("soup", "One quantized model: the mean of the latent weights, quantized anew.", "quantized", one_model=True),
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
