"""Penalties on what differs between domains: features (CORAL, Deep CORAL, MMD) or gradients (Fishr)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.objectives.base import OBJECTIVES, DomainBatch, DomainOutputs, ModelView, Objective, ObjectiveSetting
from qtdog.objectives.functional import domain_losses, mean_over_pairs
from qtdog.objectives.risks import erm_loss


def coral_penalty(features: Sequence[Tensor]) -> Tensor:
    """Return how far means and covariances of features differ between domains.

    Formula: mean over pairs of domains i < j of [mean((μ_i − μ_j)²) + mean((C_i − C_j)²)], with the covariance C over
    n − 1. Source: DomainBed's CORAL, after Sun and Saenko (ECCV workshops 2016), whose own form is `deep-coral`.

    Args:
        features: of each domain, shape (n, d), n ≥ 2.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
        >>> coral_penalty([x, 2 * x])  # (1 - 2)² + (2 - 8)²
        tensor(37.)
    """
    if len(features) > MANY_DOMAINS:
        means = torch.stack([domain.mean(0) for domain in features])
        spread = 2 * (means - means.mean(0)).square().sum() / (len(means) - 1) / means.shape[1]
        return spread + mean_square_between_covariances(features)
    moments = [(domain.mean(0), covariance(domain)) for domain in features]
    return mean_over_pairs(_distance, moments)


MANY_DOMAINS = 16
"""Up to here pairs of domains are compared one by one; beyond, all at once, which differs by rounding."""


def mean_square_between_covariances(features: Sequence[Tensor]) -> Tensor:
    """Return the mean over pairs of domains i < j of mean((C_i − C_j)²), in time that grows with the domains alone.

    With Z_i the centered features over √(n_i − 1): Σ_{i<j} ‖C_i − C_j‖² = D Σ_i ‖C_i‖² − ‖Σ_i C_i‖², where
    ‖C_i‖ = ‖Z_i Z_iᵀ‖ and ‖Σ_i C_i‖ = ‖Zᵀ Z‖ for all rows together. No covariance of a single domain is made where it
    is larger than the products of its images. Relative error: that of float32 times Σ‖C_i‖² / Σ‖C_i − C̄‖².

    Args:
        features: of each of D domains, shape (n, d), n ≥ 2.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [2.0]])  # variance 2
        >>> mean_square_between_covariances([x, 2 * x, x])  # two pairs of three differ by 6
        tensor(24.)
    """
    rows = [(domain - domain.mean(0)) / (len(domain) - 1) ** 0.5 for domain in features]
    n_domains, dim = len(rows), rows[0].shape[1]
    single = torch.stack([_smaller_gram(one).square().sum() for one in rows]).sum()
    together = _smaller_gram(torch.cat(rows)).square().sum()
    return (n_domains * single - together).clamp(min=0) * 2 / (n_domains * (n_domains - 1)) / dim**2


def _smaller_gram(rows: Tensor) -> Tensor:
    """Return X Xᵀ or Xᵀ X, whichever is smaller; both have the same norm."""
    return rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows


def covariance(features: Tensor) -> Tensor:
    """Return the covariance (d, d) of features (n, d), over n − 1.

    Example:
        >>> import torch
        >>> covariance(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        tensor([[ 2.0000, -1.0000],
                [-1.0000,  0.5000]])
    """
    centered = features - features.mean(0)
    return centered.T @ centered / (len(features) - 1)


def _distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    (mean, cov), (other_mean, other_cov) = one, other
    return (mean - other_mean).square().mean() + (cov - other_cov).square().mean()


@OBJECTIVES.register("coral")
class CORAL(Objective):
    """Alignment of the features' means and covariances: CORAL as in DomainBed (after Sun and Saenko, 2016).

    L = mean over domains of CE + weight · `coral_penalty` of the penultimate features.
    """

    MEAN_CROSS_ENTROPY: ClassVar[str] = "domains"
    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(1.0, "of the penalty (mmd_gamma)", low=0, search=(1e-1, 10), log=True),
    }
    MIN_DOMAINS = 2
    MIN_BATCH = 2

    def penalty(self, features: Sequence[Tensor]) -> Tensor:
        """Return how far the features (n, d) of the domains differ."""
        return coral_penalty(features)

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the scalar loss of the outputs of all source domains."""
        penalty = self.penalty([domain.features for domain in domains])
        return domain_losses(domains).mean() + self.number("weight") * penalty


def deep_coral_penalty(features: Sequence[Tensor]) -> Tensor:
    """Return how far the covariances of features differ between domains.

    Formula: mean over pairs of domains i < j of ‖C_i − C_j‖²_F / (4 d²), with the covariance C over n − 1. Source: Sun
    and Saenko, ECCV workshops 2016, Eq. 1 to 3, for one pair; the mean over pairs is ours.

    Args:
        features: of each domain, shape (n, d), n ≥ 2.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [2.0]])  # variance 2
        >>> deep_coral_penalty([x, 2 * x])  # (2 - 8)² / 4
        tensor(9.)
    """
    if len(features) > MANY_DOMAINS:
        return mean_square_between_covariances(features) / 4
    return mean_over_pairs(_covariance_distance, [covariance(domain) for domain in features])


def _covariance_distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().mean() / 4


@OBJECTIVES.register("deep-coral")
class DeepCORAL(CORAL):
    """Alignment of the features' covariances alone: Deep CORAL (Sun and Saenko, ECCV workshops 2016).

    L = mean over domains of CE + weight · `deep_coral_penalty` of the penultimate features. DomainBed's form is
    `coral`: it counts the means too, and covariances four times as much.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(1.0, "of the penalty (λ; searched as coral's)", low=0, search=(1e-1, 10), log=True),
    }

    def penalty(self, features: Sequence[Tensor]) -> Tensor:
        """Return how far the covariances of the features (n, d) of the domains differ."""
        return deep_coral_penalty(features)


GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # DomainBed's inverse bandwidths


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy of two sets of features.

    Formula: mean k(x, x') + mean k(y, y') − 2 mean k(x, y) over all pairs, each image with itself included, with the
    kernel k(x, y) = Σ_γ exp(−γ ‖x − y‖²) over `GAMMAS`. Source: Gretton et al., JMLR 2012, Eq. 5 (the biased estimate),
    with DomainBed's kernel.

    Args:
        x: shape (n, d).
        y: shape (m, d).

    Returns:
        A scalar, not negative but for rounding.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> mmd(x, x).item(), round(mmd(x, x + 1000).item(), 4)  # (7 + 3.2618) / 2, twice
        (0.0, 10.2618)
    """
    return _mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y)


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    squared = _squared_distances(x, y)
    return torch.stack([torch.exp(-gamma * squared).mean() for gamma in GAMMAS]).sum()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    # By differences, not by ‖x‖² + ‖y‖² − 2xy: γ = 1000 would show what cancels there.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def mmd_penalty(features: Sequence[Tensor]) -> Tensor:
    """Return the mean over pairs of domains of `mmd`; more than `MANY_DOMAINS` are compared with one kernel matrix.

    With the mean kernel M_ij of two of D domains, Σ_{i<j} (M_ii + M_jj − 2 M_ij) = D Σ_i M_ii − Σ_ij M_ij.

    Args:
        features: of each domain, shape (n, d).

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> round(mmd_penalty([x, x + 1000]).item(), 4)
        10.2618
    """
    if len(features) <= MANY_DOMAINS:
        return mean_over_pairs(mmd, features)
    rows = torch.cat(list(features))
    squared = _squared_distances(rows, rows)
    kernel = torch.stack([torch.exp(-gamma * squared) for gamma in GAMMAS]).sum(0)
    means = torch.block_diag(*(one.new_full((1, len(one)), 1 / len(one)) for one in features))  # (D, N)
    between, n_domains = means @ kernel @ means.T, len(features)
    return (n_domains * between.trace() - between.sum()) * 2 / (n_domains * (n_domains - 1))


@OBJECTIVES.register("mmd")
class MMD(Objective):
    """Alignment of the features' distributions by their maximum mean discrepancy (Li et al., CVPR 2018).

    L = mean over domains of CE + weight · mean over pairs of domains of `mmd` of the penultimate features. As in
    DomainBed, without the paper's autoencoder and adversary.
    """

    MEAN_CROSS_ENTROPY: ClassVar[str] = "domains"
    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(1.0, "of the discrepancy (mmd_gamma)", low=0, search=(1e-1, 10), log=True),
    }
    MIN_DOMAINS = 2

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the scalar loss of the outputs of all source domains."""
        penalty = mmd_penalty([domain.features for domain in domains])
        return domain_losses(domains).mean() + self.number("weight") * penalty


def gradient_variance(domain: DomainOutputs) -> Tensor:
    """Return the variance, over the images of a domain, of the gradient of each weight of the linear classifier.

    The cross-entropy of image i has the gradient e_i[c] · f_i[k], with the error e = softmax(z) − onehot(y) and the
    features f, to which a 1 is appended for the bias. Formula: mean_i (e_i[c]² · f_i[k]²) − (mean_i e_i[c] · f_i[k])²,
    which needs no tensor of shape (n, n_classes, d).

    Args:
        domain: its outputs.

    Returns:
        Shape (n_classes, d + 1), over n (not n − 1), the bias last, differentiable.

    Example:
        >>> logits, features = torch.zeros(2, 2), torch.tensor([[1.0], [3.0]])
        >>> # gradients -1/2 and -3/2 of the first class's weight, -1/2 and -1/2 of its bias
        >>> gradient_variance(DomainOutputs(features, logits, torch.tensor([0, 0])))
        tensor([[0.2500, 0.0000],
                [0.2500, 0.0000]])
    """
    errors = domain.logits.softmax(1) - one_hot(domain.labels, domain.logits.shape[1])
    inputs = pad(domain.features, (0, 1), value=1.0)
    n = len(inputs)
    return errors.square().T @ inputs.square() / n - (errors.T @ inputs / n).square()


def variance_penalty(variances: Tensor) -> Tensor:
    """Return the mean over domains and weights of (v_d − mean over domains of v)².

    Source: Ramé et al., ICML 2022, divided by the number of weights, as in DomainBed.

    Args:
        variances: v, shape (n_domains, …).

    Returns:
        A scalar.

    Example:
        >>> variance_penalty(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        tensor(0.5000)
    """
    return variances.var(0, correction=0).mean()


@OBJECTIVES.register("fishr")
class Fishr(Objective):
    """Equal variances of the classifier's gradients in all domains: Fishr (Ramé et al., ICML 2022).

    L = CE + weight · `variance_penalty` of ṽ_d = v̄_d / (1 − ema), where v̄_d ← ema · v̄_d + (1 − ema) · v_d is the moving
    average, from 0, of `gradient_variance`. The gradient flows through the present v_d, and the division by 1 − ema
    makes it independent of `ema`. For the first `anneal_steps` steps the penalty does not count but the average
    moves. All of this as in DomainBed, which also starts Adam anew when the penalty sets in; an objective knows no
    optimizer, so here Adam goes on with the moments that it has.

    Where the classifier is quantized, its gradients are those of the quantized weights. The averages are kept in
    checkpoints.
    """

    ACCUMULATES: ClassVar[str | None] = "outputs"
    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(1000.0, "of the penalty (lambda)", low=0, search=(10, 1e4), log=True),
        "anneal_steps": HyperParameter(
            1500, "steps without penalty before (penalty_anneal_iters)", low=0, search=(0, 5000)
        ),
        "ema": HyperParameter(0.95, "decay of the average of variances", low=0, high=0.999, search=(0.9, 0.99)),
    }
    MIN_DOMAINS = 2
    MIN_BATCH = 2
    average: Tensor
    before: Tensor

    def __init__(self, setting: ObjectiveSetting, params: Mapping[str, Value]) -> None:
        super().__init__(setting, params)
        zeros = torch.zeros(setting.n_domains, setting.n_classes, setting.n_features + 1)
        self.register_buffer("average", zeros)
        # of the step before, from which a second pass over a step starts again
        self.register_buffer("before", zeros.clone(), persistent=False)

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step, after moving the averages."""
        domains = view.outputs(batch)
        if self.new_step(batch):
            self.before.copy_(self.average)
        ema = self.number("ema")
        present = torch.stack([gradient_variance(domain) for domain in domains])
        average = ema * self.before + (1 - ema) * present
        self.remember_(self.average, average)
        loss = erm_loss(domains)
        if batch.step < self.number("anneal_steps"):
            return loss
        return loss + self.number("weight") * variance_penalty(average / (1 - ema))
