"""`--cascade`: an ensemble that asks no more members than it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from qtdog.ensemble.cascade import CascadeModel
    from qtdog.ensemble.model import EnsembleModel
    from qtdog.training.load import ShippedModel


def cascading(shipped: ShippedModel | EnsembleModel) -> CascadeModel:
    """Return an ensemble as a cascade.

    Raises:
        ConfigError: it is one model, or its file has no threshold.
    """
    from qtdog.core.errors import ConfigError
    from qtdog.ensemble.cascade import CascadeModel
    from qtdog.ensemble.model import EnsembleModel

    if not isinstance(shipped, EnsembleModel):
        raise ConfigError("--cascade is for an ensemble; this file holds one model")
    return CascadeModel(shipped)


def cascade_rows(model: CascadeModel, inputs: Tensor) -> list[dict[str, Any]]:
    """Return what a cascade says of each input, in order, with the number of `members` that were asked."""
    from qtdog.cli.predict import logit_rows

    rows: dict[int, dict[str, Any]] = {}
    for group in model.ask(inputs):
        n_asked = len(group.logits)
        for place, row in zip(group.places.tolist(), logit_rows(model.model, group.logits), strict=True):
            doubt = {"mutual_information": 0.0, "agreement": 1.0}
            rows[place] = row | {name: row.get(name, value) for name, value in doubt.items()} | {"members": n_asked}
    return [rows[place] for place in sorted(rows)]


def say_members(rows: Sequence[dict[str, Any]], n_members: int) -> None:
    """Print how many members were asked on average to standard error; nothing without an answer."""
    from qtdog.cli.console import err

    if rows:
        mean = sum(row["members"] for row in rows) / len(rows)
        text = f"cascade: {mean:.2f} of {n_members} members asked on average"
        err.print(text, highlight=False)
