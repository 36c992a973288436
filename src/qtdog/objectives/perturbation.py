"""Losses under a change of images (Mixup) or features (RSC, SagNet, CCFP)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from qtdog.core.errors import ConfigError
from qtdog.core.feature_maps import Stage, Style, restyle, style
from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ModelView, Objective, ObjectiveSetting
from qtdog.objectives.functional import at_stages, kept_at_stages, linear_head, random_ring


def mixed_loss(logits: Tensor, labels: tuple[Tensor, Tensor], share: float) -> Tensor:
    """Return λ · CE(z, y₁) + (1 − λ) · CE(z, y₂).

    Source: Zhang et al., ICLR 2018, section 2; the same as the cross-entropy with the mixed label λ y₁ + (1 − λ) y₂.

    Args:
        logits: z of the mixed images, shape (n, n_classes).
        labels: y₁ and y₂, int64, shape (n,) each.
        share: λ, of the first image.

    Returns:
        A scalar.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0]])  # cross-entropies 0.3133 and 1.3133
        >>> mixed_loss(logits, (torch.tensor([0]), torch.tensor([1])), 0.75)
        tensor(0.5633)
    """
    return share * cross_entropy(logits, labels[0]) + (1 - share) * cross_entropy(logits, labels[1])


def draw_shares(alpha: float, n: int) -> list[float]:
    """Return n draws from Beta(α, α), from torch's global state, which the training loop seeds for every step.

    Example:
        >>> all(0 <= share <= 1 for share in draw_shares(0.2, 3))
        True
    """
    concentration = torch.tensor(alpha, dtype=torch.float64)
    return torch.distributions.Beta(concentration, concentration).sample((n,)).tolist()


@OBJECTIVES.register("mixup")
class Mixup(Objective):
    """Mixtures of images and labels of two domains (Zhang et al., ICLR 2018; between domains Yan et al., 2020).

    The domains stand on a ring in random order. Each gives its images x₁ with labels y₁, its neighbor x₂ and y₂; one
    λ ~ Beta(α, α) per pair of domains mixes x = λ x₁ + (1 − λ) x₂. L = mean over the pairs of `mixed_loss`. As in
    DomainBed. All mixtures go through the network in one pass; with batch norm that is not frozen, its statistics are
    those of all of them.
    """

    ACCUMULATES: ClassVar[str | None] = "outputs"
    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "alpha": HyperParameter(0.2, "of Beta(α, α)", low=1e-3, search=(1e-1, 10), log=True),
    }
    MIN_DOMAINS = 2
    EQUAL_SHARES = True

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        images, labels = zip(*batch.split(), strict=True)
        pairs = random_ring(len(images))
        shares = draw_shares(self.number("alpha"), len(pairs))
        mixed = torch.empty_like(batch.images)  # of its memory format too: `cat` loses that of grey images
        for (one, other), share, part in zip(pairs, shares, mixed.split(batch.sizes), strict=True):
            torch.lerp(images[other], images[one], share, out=part)
        _, logits = view(mixed)
        chosen = [(labels[one], labels[other]) for one, other in pairs]
        return _mean_loss(logits.split(batch.sizes), chosen, shares)


def _mean_loss(logits: Sequence[Tensor], labels: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float]) -> Tensor:
    return torch.stack([mixed_loss(*mixture) for mixture in zip(logits, labels, shares, strict=True)]).mean()


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

    ACCUMULATES: ClassVar[str | None] = "outputs"
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


MAP_STAGE = 3  # the paper randomizes behind the third stage of a ResNet


def style_randomized(features: Tensor, dims: Sequence[int], share: Tensor, partner: Tensor) -> Tensor:
    """Return the features with their own content, and a style between their own and their partner's.

    Formula: with μ, σ over `dims`, σ'² = α σ(x)² + (1 - α) σ(x̃)², μ' = α μ(x) + (1 - α) μ(x̃),
    x' = σ' (x - μ) / σ + μ'. Source: Nam et al., *Reducing Domain Gap by Reducing Style Bias* (CVPR 2021), as in
    DomainBed, which mixes variances where the paper mixes standard deviations.

    Args:
        features: of n images.
        dims: dimensions that the style is taken over.
        share: α of each image, shape (n,).
        partner: which image x̃ is, int64, shape (n,).

    Example:
        >>> features = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
        >>> style_randomized(features, [1], share=torch.zeros(2), partner=torch.tensor([0, 0]))[0]
        tensor([1., 3.])
    """
    own = style(features, dims)
    alpha = share.to(own.mean.dtype).reshape(-1, *[1] * (features.ndim - 1))
    mean = alpha * own.mean + (1 - alpha) * own.mean[partner]
    var = alpha * own.std**2 + (1 - alpha) * own.std[partner] ** 2
    return restyle(features, own, Style(mean, var.sqrt()))


def content_randomized(features: Tensor, dims: Sequence[int], partner: Tensor) -> Tensor:
    """Return the features with their own style, and the content of their partner, to which no gradient goes.

    Formula: x' = σ(x) (x̃ - μ(x̃)) / σ(x̃) + μ(x). Source: Nam et al. (CVPR 2021), as in DomainBed.

    Example:
        >>> features = torch.tensor([[1.0, 3.0], [14.0, 10.0]])
        >>> content_randomized(features, [1], partner=torch.tensor([1, 0])).round(decimals=3)
        tensor([[ 3.,  1.],
                [10., 14.]])
    """
    own = style(features, dims)
    content = ((features - own.mean) / own.std)[partner].detach()
    return content * own.std + own.mean


def uniformity_loss(logits: Tensor) -> Tensor:
    """Return the mean cross-entropy between the uniform distribution and the softmax of `logits` (n, n_classes).

    Formula: −1/n · Σ_i 1/K · Σ_k log softmax(z_i)[k], at least log K. Source: Nam et al. (CVPR 2021).

    Example:
        >>> round(uniformity_loss(torch.zeros(3, 4)).item(), 4)  # log 4
        1.3863
    """
    return -logits.log_softmax(dim=1).mean()


@OBJECTIVES.register("sagnet")
class SagNet(Objective):
    """Classify under random styles; let nothing be read off the style alone (Nam et al., CVPR 2021).

    L = CE(c(SR(f)), y) + CE(s(CR(f)), y) + weight · uniformity(s(CR(f)))

    with SR and CR as in `style_randomized` and `content_randomized`. c is the network's classifier, s a linear head of
    its own on the style, which is never saved in the model file. The second term trains s alone, the third the
    featurizer alone.

    `level` says where the style is: "vector", over the penultimate features of an image as DomainBed has it, or "map",
    per channel over the positions behind the third stage, as the paper has it. There s sees the means and standard
    deviations (swapping contents does not change them), where the paper has a copy of the later stages.

    DomainBed has three optimizers that step one after the other, the last with draws of its own. Here it is one loss,
    one step and one draw: the featurizer follows the sum of its two gradients, which Adam scales together.

    Raises:
        ConfigError: `level` is "map" and the backbone has fewer than four stages.
        ModelError: `level` is "map" and the backbone has no stages.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(0.1, "of the adversarial term (sag_w_adv)", low=0, search=(1e-2, 10), log=True),
        "level": HyperParameter(
            "vector", "where the style is: of the features as a vector, or of a map", choices=("vector", "map")
        ),
    }
    ONE_PROCESS = True

    def __init__(self, setting: ObjectiveSetting, params: Mapping[str, Value]) -> None:
        super().__init__(setting, params)
        self.stage = _map_stage(setting) if self.params["level"] == "map" else None
        n_inputs = setting.n_features if self.stage is None else 2 * self.stage.n_channels
        self.style_head = linear_head(n_inputs, setting.n_classes, setting.seed, "style head")

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        n, device = len(batch.labels), batch.labels.device
        share, partner = torch.rand(n, device=device), torch.randperm(n, device=device)
        if self.stage is None:
            features, _ = view(batch.images)
            logits = view.classify(style_randomized(features, [1], share, partner))
            styles = content_randomized(features, [1], torch.randperm(n, device=device))
        else:
            logits, styles = self._through_map(view, batch.images, share, partner)
        frozen = {name: value.detach() for name, value in self.style_head.named_parameters()}
        adversarial = uniformity_loss(functional_call(self.style_head, frozen, (styles,)))
        style_loss = cross_entropy(self.style_head(styles.detach()), batch.labels)
        return cross_entropy(logits, batch.labels) + style_loss + self.number("weight") * adversarial

    def _through_map(self, view: ModelView, images: Tensor, share: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits under random styles of the map, and the style of each image (n, 2 C)."""
        styles: list[Tensor] = []

        def act(stage: Stage, features: Tensor) -> Tensor:
            styles.append(torch.cat([value.flatten(1) for value in style(features, stage.positions)], dim=1))
            return style_randomized(features, stage.positions, share, partner)

        assert self.stage is not None
        with at_stages(view.network, [self.stage], act):
            _, logits = view(images)
        return logits, styles[0]


def _map_stage(setting: ObjectiveSetting) -> Stage:
    stages = setting.stages()
    if len(stages) <= MAP_STAGE:
        text = f"objective 'sagnet' with level=map works behind stage {MAP_STAGE} of at least {MAP_STAGE + 1}"
        raise ConfigError(f"{text}, this backbone has {len(stages)}: take level=vector, or another backbone.")
    return stages[MAP_STAGE - 1]


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
    OWN_GRADIENTS = True

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
