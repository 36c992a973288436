"""Fitting an ensemble's temperature on the sources, and saying what it does."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from qtdog.ensemble.answers import answers, reliability
from qtdog.ensemble.calibration import fit_temperature
from qtdog.ensemble.exam import Kept


def calibrate(source: Kept, test: Kept) -> dict[str, Any]:
    """Return the temperature for an ensemble's probabilities, and their reliability without and with it.

    The temperature is fitted to the held-out images of the sources alone; without any it is 1. The test images are
    measured with it, never fitted to.

    Args:
        source: members' logits (members, n, n_classes) and labels (n,) on held-out source images, batch by batch.
        test: the same on test images.

    Returns:
        `temperature`, and for `source` and `test`, where there are such images, `before` and `after`: each `ece`,
        `brier`, `aurc`, `risk_at_90`.

    Example:
        >>> right = (torch.tensor([[[2.0, 0.0]] * 4]), torch.tensor([0, 0, 0, 1]))
        >>> told = calibrate([right], [])
        >>> round(told["temperature"], 2), sorted(told)
        (1.82, ['source', 'temperature'])
    """
    told: dict[str, Any] = {"temperature": 1.0}
    sets = {name: _joined(kept) for name, kept in (("source", source), ("test", test)) if kept}
    if "source" in sets:
        logits, labels = sets["source"]
        told["temperature"] = fit_temperature(logits.mean(0), labels)
    for name, (logits, labels) in sets.items():
        when = {"before": 1.0, "after": told["temperature"]}
        told[name] = {key: asdict(reliability(answers(logits, t), labels)) for key, t in when.items()}
    return told


def _joined(kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([logits for logits, _ in kept], 1), torch.cat([labels for _, labels in kept])
