"""Answering only when sure: risk against coverage, rejection, and images of unknown kinds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from qtdog.core.errors import ConfigError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RiskCoverage:
    """Error among the answered images when only the surest are answered.

    Attributes:
        coverage: share answered, rising to 1, shape (n,).
        risk: share of wrong answers among them, (n,).
        area: mean risk over all coverages (AURC); lower is better.
    """

    coverage: Floats
    risk: Floats
    area: float

    def risk_at(self, coverage: float) -> float:
        """Return the risk when at least this share of the images is answered."""
        return float(self.risk[int(np.searchsorted(self.coverage, coverage - 1e-12))])


def risk_coverage(doubt: npt.ArrayLike, correct: npt.ArrayLike) -> RiskCoverage:
    """Return the risk-coverage curve (El-Yaniv and Wiener, JMLR 2010; area as in Geifman et al., ICLR 2019).

    Images of equal doubt are answered together: each of them gets the risk at the end of its group.

    Args:
        doubt: higher is less sure, shape (n,).
        correct: whether each answer is right, shape (n,).

    Raises:
        ConfigError: there are no images.

    Example:
        >>> curve = risk_coverage([0.1, 0.2, 0.9, 0.8], [True, True, False, True])
        >>> curve.risk.tolist(), curve.risk_at(0.75)
        ([0.0, 0.0, 0.0, 0.25], 0.0)
    """
    values, right = np.asarray(doubt, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if not len(values):
        raise ConfigError("there are no images to draw a risk-coverage curve of")
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    answered = np.arange(1, len(values) + 1)
    wrong = np.cumsum(1 - right[order])
    ends = np.searchsorted(ranked, ranked, side="right") - 1
    risk = (wrong / answered)[ends]
    return RiskCoverage(answered / len(values), risk, float(risk.mean()))


def rejected(doubt: npt.ArrayLike, frac: float) -> npt.NDArray[np.bool_]:
    """Return which images to abstain on: the least certain share, rounded down; among equals the later ones.

    Args:
        doubt: higher is less sure, shape (n,).
        frac: share to reject, 0 ≤ frac < 1.

    Raises:
        ConfigError: the share is out of range.

    Example:
        >>> rejected([0.1, 0.9, 0.5, 0.2], 0.25).tolist()
        [False, True, False, False]
    """
    if not 0 <= frac < 1:
        raise ConfigError(f"the share to reject must be at least 0 and below 1, not {frac:g}")
    values = np.asarray(doubt, dtype=np.float64)
    mask = np.zeros(len(values), dtype=bool)
    n_rejected = int(frac * len(values) + 1e-9)
    if n_rejected:
        mask[np.argsort(values, kind="stable")[-n_rejected:]] = True
    return mask


def unknown_auroc(known: npt.ArrayLike, unknown: npt.ArrayLike) -> float:
    """Return the probability that an image of an unknown kind gets more doubt than a known one (area under the ROC).

    0.5 is chance, 1 separates perfectly (Hendrycks and Gimpel, ICLR 2017).

    Args:
        known: doubt of images of the classes that the model knows, shape (n,).
        unknown: doubt of other images, shape (m,).

    Raises:
        ConfigError: one of the two is empty.

    Example:
        >>> unknown_auroc([0.1, 0.3], [0.2, 0.9])
        0.75
    """
    first, second = np.asarray(known, dtype=np.float64), np.asarray(unknown, dtype=np.float64)
    if not (len(first) and len(second)):
        raise ConfigError("the comparison needs known and unknown images; one folder gave none")
    truth = np.concatenate([np.zeros(len(first)), np.ones(len(second))])
    return float(roc_auc_score(truth, np.concatenate([first, second])))
