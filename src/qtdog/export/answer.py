"""From the members' logits to answers and doubt, with operators that every runtime has."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Answer(nn.Module):
    """The outputs of a model: of one network logits and probabilities, of several also their doubt.

    Logits z = mean_m z_m; probabilities p = softmax(z / T). Several members also say the entropy of p in nats, the
    mutual information H(mean_m p_m) - mean_m H(p_m) between class and member (Depeweg et al., ICML 2018, Eq. 5), and
    the share of the members whose first choice is the ensemble's: as in `qtdog predict`. In a cascade the means are
    over the members that were asked.

    Args:
        temperature: T.

    Shapes:
        (n, members, n_classes) and, for a cascade, members asked (n,) → logits and probabilities (n, n_classes), each
        doubt (n,)

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> together = Answer()(logits)
        >>> alone = Answer()(logits, torch.tensor([1]))
        >>> [output.tolist() for output in (together[0], alone[0], together[4], alone[4])]
        [[[1.0, 1.0]], [[2.0, 0.0]], [0.5], [1.0]]
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, each: Tensor, asked: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return logits and probabilities, and of several members entropy, mutual information and agreement."""
        if each.shape[1] == 1:
            logits = each[:, 0]
            return logits, (logits / self.temperature).softmax(1)
        mean = _Mean(each, asked)
        logits = mean(each)
        log_p = (logits / self.temperature).log_softmax(1)
        log_each = (each / self.temperature).log_softmax(2)
        mixture = mean(log_each.exp())
        # the smallest normal number stands in for 0, where the limit of p log p is 0
        whole = -(mixture * mixture.clamp(min=torch.finfo(torch.float32).tiny).log()).sum(1)
        doubt = (whole - mean(_entropy(log_each)[:, :, None])[:, 0]).clamp(min=0)
        agrees = (each.argmax(2) == logits.argmax(1, keepdim=True)).to(torch.float32)
        return logits, log_p.exp(), _entropy(log_p), doubt, mean(agrees[:, :, None])[:, 0]


class _Mean:
    """The mean over the members that were asked, (n, members, k) → (n, k)."""

    def __init__(self, each: Tensor, asked: Tensor | None) -> None:
        self.mask: Tensor | None = None
        self.counts: Tensor | int = each.shape[1]
        if asked is not None:
            places = torch.arange(each.shape[1], device=each.device)
            self.mask = (places[None, :, None] < asked[:, None, None]).to(each.dtype)
            self.counts = asked[:, None].to(each.dtype)

    def __call__(self, values: Tensor) -> Tensor:
        return (values if self.mask is None else values * self.mask).sum(1) / self.counts


def settled(each: Tensor, temperature: float, threshold: float) -> Tensor:
    """Return which images need no further member, (n,): all so far have one first choice, and are sure of it.

    The rule of `ensemble.cascade`: the probability of the choice, softmax(mean logits / T), reaches the threshold.

    Args:
        each: logits of the members asked so far, (n, members, n_classes).
        temperature: T.
        threshold: a probability.

    Example:
        >>> settled(torch.tensor([[[9.0, 0.0]], [[0.1, 0.0]]]), 1.0, 0.9)
        tensor([ True, False])
    """
    choices = each.argmax(2)
    sure = (each.mean(1) / temperature).softmax(1).amax(1) >= threshold
    return sure & (choices == choices[:, :1]).all(1)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)
