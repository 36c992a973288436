"""One finished model as tables and reports see it, wherever it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtdog.runs.record import Record

# What names a problem or a repetition of it, and not a method: entries that differ in nothing else share a row.
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


@dataclass(frozen=True)
class Outcome:
    """What one way to choose a checkpoint gives; accuracies as fractions, None where nothing was measured.

    Attributes:
        step: of the checkpoint; None for a mean over several, or an ensemble.
        source: mean accuracy on the held-out part of the sources.
        target: accuracy on the whole unseen domain.
        target_80: accuracy on its 80 % split, which DomainBed's tables report.
    """

    step: int | None
    source: float | None
    target: float | None
    target_80: float | None

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
class Entry:
    """One finished run, ensemble, or run of DomainBed.

    Attributes:
        kind: `run`, `ensemble` or `domainbed`.
        path: its folder or file.
        dataset: the data set, with its test mode if that is not the usual one.
        content: hash of the data set's content; empty if unknown.
        target: the unseen domain.
        trial: which random 20 % of each domain was held out.
        seed: of training.
        method: short name of the method, without what several settings of it differ in.
        settings: the configuration by `section.key`, without `NOT_SETTINGS`; empty if unknown.
        selection: how the checkpoint that ships was chosen.
        shipped: what that one measured; None if nothing was shipped.
        records: all evaluations; empty if the other ways to choose cannot be recomputed.
        start_step: the first quantized step; None in float.
        mean_from: the mean over evaluations takes those after this step.
        cost: size, models, steps and passes.
        result: the whole `result.json`; empty for DomainBed.
    """

    kind: str
    path: Path
    dataset: str
    content: str
    target: str
    trial: int
    seed: int
    method: str
    settings: Mapping[str, Any] = field(repr=False)
    selection: str
    shipped: Outcome | None
    records: tuple[Record, ...] = field(repr=False)
    start_step: int | None
    mean_from: int
    cost: Cost
    result: Mapping[str, Any] = field(default_factory=dict, repr=False)


def settings_of(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what makes the method of a configuration, by `section.key`.

    A float network has no grid, so of its quantizer only the name is kept.

    Example:
        >>> settings_of({"quantizer": {"name": "none", "bits": 7}, "train": {"steps": 5, "seed": 1}})
        {'quantizer.name': 'none', 'train.steps': 5}
    """
    tree = {section: dict(values) for section, values in config.items()}
    if tree.get("quantizer", {}).get("name") == "none":
        tree["quantizer"] = {"name": "none"}
    flat = {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
    return {key: value for key, value in flat.items() if key not in NOT_SETTINGS}
