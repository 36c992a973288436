"""Representation self-challenging."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ModelView, Objective


def kept_features(gradient: Tensor, frac: float) -> Tensor:
    """Return which features of each image stay: those with a gradient below the image's (1 − frac) quantile.

    Source: Huang et al., ECCV 2020, Eq. 2; the quantile interpolates linearly, as in DomainBed.

    Args:
        gradient: of the true class's logit with respect to the features, shape (n, d).
        frac: share of the features to mute.

    Returns:
        Bool, shape (n, d). Even with frac = 0 the largest gradient is muted: it is not below itself.

    Example:
        >>> kept_features(torch.tensor([[3.0, 1.0, -2.0, 0.0]]), 1 / 3)
        tensor([[False,  True,  True,  True]])
    """
    return gradient < gradient.quantile(1 - frac, dim=1, keepdim=True)


def spared_images(drop: Tensor, frac: float) -> Tensor:
    """Return which images keep all features: those whose confidence drops less than the (1 − frac) quantile.

    Source: Huang et al., ECCV 2020, section 3.3.

    Args:
        drop: by how much muting lowers the probability of the true class, shape (n,).
        frac: share of the images to challenge.

    Returns:
        Bool, shape (n,).

    Example:
        >>> spared_images(torch.tensor([0.0, 0.5, 0.1, 0.2]), 1 / 3)
        tensor([ True, False,  True,  True])
    """
    return drop < drop.quantile(1 - frac)


@OBJECTIVES.register("rsc")
class RSC(Objective):
    """Classification without the features that help most: self-challenging (Huang et al., ECCV 2020).

    In every image the features whose gradient of the true class's logit is largest are set to zero, but only in the
    images whose probability of the true class falls most by that; L = cross-entropy of what the classifier says then.
    As in DomainBed, whose quantiles are over the whole batch; features are vectors here, so the paper's spatial variant
    does not apply.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "feature_frac": HyperParameter(
            1 / 3, "share of the features to mute (rsc_f_drop_factor)", low=0, high=1, search=(0, 0.5)
        ),
        "image_frac": HyperParameter(
            1 / 3, "share of the images to challenge (rsc_b_drop_factor)", low=0, high=1, search=(0, 0.5)
        ),
    }

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        domains = view.outputs(batch)
        features = torch.cat([domain.features for domain in domains])
        labels = torch.cat([domain.labels for domain in domains])
        kept = self._kept(view, features.detach(), labels)
        return cross_entropy(view.classify(features * kept), labels)

    def _kept(self, view: ModelView, features: Tensor, labels: Tensor) -> Tensor:
        """Return which features count, shape (n, d)."""
        features.requires_grad_()
        logits = view.classify(features)
        (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), features)
        kept = kept_features(gradient, self.number("feature_frac"))
        with torch.no_grad():
            muted = view.classify(features * kept)
            before, after = (z.softmax(1).gather(1, labels[:, None]).squeeze(1) for z in (logits, muted))
            return kept | spared_images(before - after, self.number("image_frac"))[:, None]
