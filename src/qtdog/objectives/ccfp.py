"""CCFP: two streams, one with learned shifts of style, that must agree (Li et al., ICCV 2023)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from qtdog.core.errors import ConfigError
from qtdog.core.feature_maps import Stage, Style, restyle, style
from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ModelView, Objective, ObjectiveSetting
from qtdog.objectives.functional import at_stages, kept_at_stages, linear_head


def gram(features: Tensor, stage: Stage) -> Tensor:
    """Return the Gram matrix of each image, shape (n, C, C): G = F Fᵀ / (C · T), F the map as (C, T positions).

    Example:
        >>> tokens = Stage("blocks.0", n_channels=2, axis=2, ndim=3)
        >>> gram(torch.tensor([[[1.0, 2.0]]]), tokens)
        tensor([[[0.5000, 1.0000],
                 [1.0000, 2.0000]]])
    """
    flat = features.movedim(stage.axis, 1).flatten(2)
    return flat @ flat.mT / flat[0].numel()


def domain_discrepancy(original: Sequence[Tensor], perturbed: Sequence[Tensor], stages: Sequence[Stage]) -> Tensor:
    """Return how much the style of two streams differs: Σ_l ‖G(f_l) - G(f'_l)‖, the norm over the whole batch.

    Source: Li et al., *Cross Contrasting Feature Perturbation for Domain Generalization* (ICCV 2023), as in the
    authors' code.

    Args:
        original: feature map of each stage in one stream.
        perturbed: in the other, of the same shapes.
        stages: their layouts.

    Example:
        >>> tokens = Stage("blocks.0", n_channels=1, axis=2, ndim=3)
        >>> domain_discrepancy([torch.ones(4, 1, 1)], [torch.zeros(4, 1, 1)], [tokens]).item()
        2.0
    """
    triples = zip(original, perturbed, stages, strict=True)
    norms = [torch.linalg.vector_norm(gram(ours, stage) - gram(theirs, stage)) for ours, theirs, stage in triples]
    return torch.stack(norms).sum()


def consistency(logits: Tensor, perturbed: Tensor) -> Tensor:
    """Return mean((z - sg z')²) + mean((sg z - z')²): each stream is drawn to where the other is, sg without gradient.

    Example:
        >>> consistency(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])).item()
        1.0
    """
    return mse_loss(logits, perturbed.detach()) + mse_loss(logits.detach(), perturbed)


def reaching_only(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return a scalar with the same value, whose gradient reaches `parameters` and nothing else on the way.

    Example:
        >>> ours, theirs = (torch.tensor(number, requires_grad=True) for number in (2.0, 3.0))
        >>> reaching_only(ours * theirs, [ours]).backward()
        >>> ours.grad, theirs.grad
        (tensor(3.), None)
    """
    found = torch.autograd.grad(value, parameters, retain_graph=True)
    terms = [(grad * (one - one.detach())).sum() for grad, one in zip(found, parameters, strict=True)]
    return value.detach() + torch.stack(terms).sum()


class StyleShifts(nn.Module):
    """Learned shifts of the style at each stage: μ + β and σ + γ, one β and γ per channel, all zero at first.

    Source: the learnable domain perturbation of Li et al. (ICCV 2023).
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.index = {stage.name: position for position, stage in enumerate(stages)}
        self.means = nn.ParameterList([torch.zeros(stage.n_channels) for stage in stages])
        self.stds = nn.ParameterList([torch.zeros(stage.n_channels) for stage in stages])

    def forward(self, stage: Stage, features: Tensor) -> Tensor:
        """Return the feature map of a stage with its style shifted."""
        position = self.index[stage.name]
        own = style(features, stage.positions)
        shifted = Style(own.mean + stage.spread(self.means[position]), own.std + stage.spread(self.stds[position]))
        return restyle(features, own, shifted)


@OBJECTIVES.register("ccfp")
class CCFP(Objective):
    """Agree with a second network whose style is shifted as far as can be learned (Li et al., ICCV 2023).

    L = CE(z, y) + CE(z', y) + consistency_weight · consistency(z, z') - discrepancy_weight · discrepancy(f, f')

    z are the logits of the network, z' those of a second one with weights of its own, in which every stage but the last
    has its style shifted (`StyleShifts`). The last term, maximized, trains the shifts alone; the first stream counts
    as fixed in it. The second network starts from the same backbone with another random head, trains in float, is kept
    in checkpoints and never in the model file.

    Follows the authors' code, and differs from it: the code shifts behind the first convolution and the pooling of the
    stem too, makes its updates one after the other with three optimizers, and predicts with the second network; here
    it is one loss and one step, and the network without shifts is saved.

    Raises:
        ConfigError: the backbone has one stage only.
        ModelError: it has no stages.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "consistency_weight": HyperParameter(
            1.0, "of the agreement of both streams (lambda_sem)", low=0, search=(1e-1, 10), log=True
        ),
        "discrepancy_weight": HyperParameter(
            1.0, "of the difference in style that the shifts make (lambda_dis)", low=0, search=(1e-1, 10), log=True
        ),
    }
    ONE_PROCESS = True

    def __init__(self, setting: ObjectiveSetting, params: Mapping[str, Value]) -> None:
        super().__init__(setting, params)
        self.stages = tuple(setting.stages())[:-1]
        if not self.stages:
            raise ConfigError("objective 'ccfp' shifts features between stages, and this backbone has one stage only")
        self.shifts = StyleShifts(self.stages)
        self.perturbed = copy.deepcopy(setting.network)
        head = linear_head(setting.n_features, setting.n_classes, setting.seed, "perturbed head")
        self.perturbed.get_submodule("classifier").load_state_dict(head.state_dict())

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        shifted: list[Tensor] = []

        def shift(stage: Stage, features: Tensor) -> Tensor:
            shifted.append(self.shifts(stage, features))
            return shifted[-1]

        with kept_at_stages(view.network, self.stages) as maps:
            _, logits = view(batch.images)
        with at_stages(self.perturbed, self.stages, shift):
            perturbed = self.perturbed(batch.images)
        discrepancy = domain_discrepancy([found.detach() for found in maps], shifted, self.stages)
        return (
            cross_entropy(logits, batch.labels)
            + cross_entropy(perturbed, batch.labels)
            + self.number("consistency_weight") * consistency(logits, perturbed)
            - self.number("discrepancy_weight") * reaching_only(discrepancy, list(self.shifts.parameters()))
        )
