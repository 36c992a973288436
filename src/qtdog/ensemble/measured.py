"""What was measured of a model made from several runs, and how it is written down."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtdog.ensemble.exam import Scores, mean_accuracy
from qtdog.ensemble.member import Member, heldout_note


@dataclass(frozen=True)
class Measured:
    """Scores by domain, the whole model first, then its members where they are asked too."""

    source: Scores
    test: Scores
    test_80: Scores

    @property
    def accuracy(self) -> dict[str, float | None]:
        """Of the whole model, each domain counting once; None where nothing was measured."""
        return {"source": mean_accuracy(self.source, 0), "test": mean_accuracy(self.test, 0)}


def describe(members: Sequence[Member], measured: Measured, folder: Path) -> dict[str, Any]:
    """Return what `result.json` says of the problem, the accuracies and the members.

    Args:
        members: the runs.
        measured: the scores of what was made of them.
        folder: where the result lies; the members' folders are given relative to it.
    """
    first = members[0]
    told = [_told(member, folder) for member in members]
    return {
        "n_members": len(members),
        "dataset": first.result.get("dataset"),
        "pretraining": " / ".join(dict.fromkeys(member.info.pretraining for member in members)),
        "target_domain": first.info.target_domain,
        "source_domains": list(first.info.source_domains),
        "no_source_score": heldout_note(members),
        "test_mode": first.config.data.test_mode,
        "selection": first.config.train.selection,
        "source_accuracy": measured.accuracy["source"],
        "test_accuracy": measured.accuracy["test"],
        "test_accuracy_80": {domain: part[0].accuracy for domain, part in measured.test_80.items()},
        "domains": {"source": _by_domain(measured.source), "test": _by_domain(measured.test)},
        "members": told,
        "member_mean": {key: _mean([one[key] for one in told]) for key in ("source_accuracy", "test_accuracy")},
    }


def _told(member: Member, folder: Path) -> dict[str, Any]:
    keys = ("source_accuracy", "test_accuracy", "selected_step", "model_sha256", "config_hash")
    told = {"folder": os.path.relpath(member.path, folder), "seed": member.config.train.seed}
    told |= {"trial": member.config.data.trial, "forked_from_step": member.forked_from[1]}
    return told | {key: member.result[key] for key in keys}


def _by_domain(scores: Scores) -> dict[str, Any]:
    return {
        domain: asdict(part[0]) | {"member_accuracies": [score.accuracy for score in part[1:]]}
        for domain, part in scores.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
