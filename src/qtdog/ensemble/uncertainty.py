"""What members know of their own doubt: entropy, mutual information, agreement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Doubt:
    """How sure an ensemble is of each image.

    Attributes:
        entropy: of the predicted class distribution, nats, shape (n,); 0 is sure, log n_classes knows nothing.
        mutual_information: between class and member, nats, (n,): the part of the doubt that comes from disagreement;
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


def doubt(member_logits: Tensor, temperature: float = 1.0) -> Doubt:
    """Return the doubt of an ensemble that averages logits.

    The ensemble predicts p = softmax(mean_m z_m / T) (paper Eq. 6). Its members' average p̄ = mean_m softmax(z_m / T)
    splits the total doubt H(p̄) into mean_m H(p_m), which each member has alone, and the rest, the mutual information
    between class and member (Depeweg et al., ICML 2018, Eq. 5; BALD, Houlsby et al., 2011). The entropy is that of p,
    the distribution that is reported.

    Args:
        member_logits: shape (members, n, n_classes).
        temperature: T.

    Example:
        >>> same = torch.tensor([[[4.0, 0.0]], [[4.0, 0.0]]])
        >>> opposed = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]]])
        >>> [round(doubt(logits).mutual_information.item(), 3) for logits in (same, opposed)]
        [0.0, 0.603]
    """
    scaled = member_logits / temperature
    members, mean = scaled.softmax(-1), scaled.mean(0)
    shared = entropy(members).mean(0)
    choice = mean.argmax(-1)
    return Doubt(
        entropy=entropy(mean.softmax(-1)),
        # rounding may leave a tiny negative number where all members say the same
        mutual_information=(entropy(members.mean(0)) - shared).clamp(min=0),
        agreement=(member_logits.argmax(-1) == choice).float().mean(0),
    )
