"""SAM: the gradient at the worst weights nearby (Foret et al., ICLR 2021)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.training.perturbation import SPACE, gradient_norm, moving_weights, perturbed
from qtdog.training.step_rules import STEP_RULES, StepRule, Update

RHO = HyperParameter(0.05, "length of the perturbation", low=0, search=(0.01, 0.5), log=True)
TINY = 1e-12  # added to the norm: a gradient of zero moves nothing


@STEP_RULES.register("sam")
class SAM(StepRule):
    """Sharpness-aware minimisation: the gradient is taken at the worst weights nearby (Foret et al., 2021).

    Formula: ε = ρ · g / ‖g‖ with g = ∇L(w), then the optimizer's step from w with ∇L(w + ε) (Eq. 2 and 3), both on the
    same batch, with the same random draws. The norm is over all weights that have a gradient, joined. The default ρ and
    the range of its search are the paper's, which tries 0.01 to 0.5.

    With quantization ε is by default added to the dequantized weights. Added to the latent ones it nearly always stays
    within a bin and vanishes, and a weight that does change its bin moves by a whole step: spread over the 23 million
    weights of a ResNet-50, ρ = 0.05 is 1e-5 for each, 1/300 of a step of 3e-3. About one weight in 300 moves, and
    together they go 0.8 far, not 0.05. `space: latent` is there to compare. Before the start step both are the same.

    Not moved are the step sizes, and the parameters of the objective (encoders, discriminators): they are not what
    ships. Both train with the gradient at w + ε. In several processes the gradients are joined before the rule sees
    them, so that all move alike.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {"rho": RHO, "space": SPACE}
    N_PASSES: ClassVar[int] = 2

    def __call__(self, update: Update) -> Tensor:
        """Make the update and return the loss at the weights before it."""
        update.optimizer.zero_grad()
        loss = update.backward()
        weights = moving_weights(update.network)
        factor = float(self.params["rho"]) / (gradient_norm(weights) + TINY)
        with perturbed(update.network, weights, factor, str(self.params["space"])):
            update.optimizer.zero_grad()
            update.backward()
        update.optimizer.step()
        return loss
