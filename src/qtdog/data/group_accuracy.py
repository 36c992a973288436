"""Accuracy over groups of samples (reviewers, hospitals): average, worst, and the 10th percentile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError


@dataclass(frozen=True)
class GroupAccuracy:
    """How right a model is, over samples and over groups of them.

    Attributes:
        average: share of all samples.
        percentile_10: the 10th percentile of the groups' own shares, interpolated linearly.
        worst: the smallest of them.
        n_groups: groups that have a sample.
    """

    average: float
    percentile_10: float
    worst: float
    n_groups: int


def group_accuracy(
    correct: npt.NDArray[np.bool_], groups: npt.NDArray[np.integer], percentile: float = 10.0
) -> GroupAccuracy:
    """Return accuracies over the groups that have a sample; each of them counts alike in the percentile.

    Source: WILDS Amazon (Koh et al., ICML 2021), whose metric is the 10th percentile over reviewers.

    Args:
        correct: whether each sample was answered right (n,).
        groups: group of each, a small integer (n,).
        percentile: which one is given as `percentile_10`.

    Raises:
        DataError: there is no sample, or the two differ in length.

    Example:
        >>> group_accuracy(np.array([True, True, False, True]), np.array([0, 0, 1, 1])).percentile_10
        0.55
    """
    if len(correct) == 0 or len(correct) != len(groups):
        raise DataError(f"accuracy over groups needs as many groups as answers, found {len(groups)} and {len(correct)}")
    total = np.bincount(groups)
    right = np.bincount(groups, weights=correct.astype(np.float64))
    own = right[total > 0] / total[total > 0]
    return GroupAccuracy(float(np.mean(correct)), float(np.percentile(own, percentile)), float(own.min()), len(own))
