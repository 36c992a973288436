"""Uncertainty of an ensemble (entropy, mutual information, agreement), and selective prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from qtdog.core.errors import ConfigError


@dataclass(frozen=True)
class Uncertainty:
    """How unsure an ensemble is about each image.

    Attributes:
        entropy: of the predicted class distribution, nats, shape (n,); 0 is sure, log n_classes knows nothing.
        mutual_information: between class and member, nats, (n,): the part that comes from disagreement;
            0 for a single model.
        agreement: share of the members whose first choice is the ensemble's, (n,).
    """

    entropy: Tensor
    mutual_information: Tensor
    agreement: Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy -Σ p log p over the last dimension, nats.

    Args:
        probabilities: shape (…, n_classes), rows that add up to 1.

    Example:
        >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.0000, 0.6931])
    """
    return torch.special.entr(probabilities).sum(-1)


def uncertainty(member_logits: Tensor, temperature: float = 1.0) -> Uncertainty:
    """Return the uncertainty of an ensemble that averages logits.

    The ensemble predicts p = softmax(mean_m z_m / T) (paper Eq. 6). Its members' average p̄ = mean_m softmax(z_m / T)
    splits the total uncertainty H(p̄) into mean_m H(p_m), which each member has alone, and the rest, the mutual
    information between class and member (Depeweg et al., ICML 2018, Eq. 5; BALD, Houlsby et al., 2011). The entropy is
    that of p, the distribution that is reported.

    Args:
        member_logits: shape (members, n, n_classes).
        temperature: T.

    Example:
        >>> same = torch.tensor([[[4.0, 0.0]], [[4.0, 0.0]]])
        >>> opposed = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]]])
        >>> [round(uncertainty(logits).mutual_information.item(), 3) for logits in (same, opposed)]
        [0.0, 0.603]
    """
    scaled = member_logits / temperature
    members, mean = scaled.softmax(-1), scaled.mean(0)
    shared = entropy(members).mean(0)
    choice = mean.argmax(-1)
    return Uncertainty(
        entropy=entropy(mean.softmax(-1)),
        # rounding may leave a tiny negative number where all members say the same
        mutual_information=(entropy(members.mean(0)) - shared).clamp(min=0),
        agreement=(member_logits.argmax(-1) == choice).float().mean(0),
    )


Floats = npt.NDArray[np.float64]


def rejected(uncertainties: npt.ArrayLike, frac: float) -> npt.NDArray[np.bool_]:
    """Return which images to abstain on: the least certain share, rounded down; among equals the later ones.

    Args:
        uncertainties: higher is less sure, shape (n,).
        frac: share to reject, 0 ≤ frac < 1.

    Raises:
        ConfigError: the share is out of range.

    Example:
        >>> rejected([0.1, 0.9, 0.5, 0.2], 0.25).tolist()
        [False, True, False, False]
    """
    if not 0 <= frac < 1:
        raise ConfigError(f"the share to reject must be at least 0 and below 1, not {frac:g}")
    values = np.asarray(uncertainties, dtype=np.float64)
    mask = np.zeros(len(values), dtype=bool)
    n_rejected = int(frac * len(values) + 1e-9)
    if n_rejected:
        mask[np.argsort(values, kind="stable")[-n_rejected:]] = True
    return mask


def unknown_auroc(known: npt.ArrayLike, unknown: npt.ArrayLike) -> float:
    """Return the probability that an image of an unknown kind is less certain than a known one: the area under the ROC.

    0.5 is chance, 1 separates perfectly (Hendrycks and Gimpel, ICLR 2017).

    Args:
        known: uncertainties of images of the classes that the model knows, shape (n,).
        unknown: uncertainties of other images, shape (m,).

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
