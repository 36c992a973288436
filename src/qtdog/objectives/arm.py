"""ARM-CML: learn to adapt to a domain from a batch of its images (Zhang et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from qtdog.core.errors import ConfigError
from qtdog.core.registry import Value
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ModelView, Objective, ObjectiveSetting


@OBJECTIVES.register("arm")
class ARM(Objective):
    """Mean cross-entropy with the context of each domain beside its images (Zhang et al., NeurIPS 2021); needs context.

    The contextual meta-learning variant: L = 1/n · Σ_i −log p(y_i | x_i, c), where c is the mean of the context network
    over the images of the domain of x_i (`models.feature_layers`). The network is `--set model.feature_layer=context`,
    and is saved with the model. At test time the images that are given together are taken for one domain, so that a
    prediction depends on the others in its batch.

    Raises:
        ConfigError: the network has no context.
    """

    def __init__(self, setting: ObjectiveSetting, params: Mapping[str, Value]) -> None:
        super().__init__(setting, params)
        if getattr(setting.network, "context", None) is None:
            text = "objective 'arm' learns from the context of a domain, and this network has none"
            raise ConfigError(f"{text}: add --set model.feature_layer=context.")

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step, from one pass in which the contexts of the domains do not mix."""
        with parametrize.cached():
            _, logits = view.model(batch.images, batch.sizes)
        return cross_entropy(logits, batch.labels)
