"""SAGM: sharpness-aware gradient matching (Wang et al., CVPR 2023)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.training.perturbation import SPACE, gradient_norm, moving_weights, perturbed
from qtdog.training.sam import RHO, TINY
from qtdog.training.step_rules import STEP_RULES, StepRule, Update

ALPHA = HyperParameter(0.001, "share of the gradient taken off the perturbation", low=0, search=(1e-4, 1e-2), log=True)


@STEP_RULES.register("sagm")
class SAGM(StepRule):
    """Sharpness-aware gradient matching: clean and perturbed loss and the gap between them (Wang et al., CVPR 2023).

    Formula: min L(w) + L(w + ε - α·g) with g = ∇L(w) and ε = ρ · g / ‖g‖, so the optimizer gets the sum

        ∇L(w) + ∇L(w + (ρ / ‖g‖ - α) · g)

    of two passes over the same batch. To first order the second term also rewards gradients of the clean and of the
    perturbed loss that point the same way. Defaults are the paper's. Their code takes half of the sum, which is the
    same for Adam; with SGD halve the learning rate to compare.

    What is moved, and where with quantization, is as in `sam`; step sizes get the same sum of two gradients.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {"rho": RHO, "alpha": ALPHA, "space": SPACE}
    N_PASSES: ClassVar[int] = 2

    def __call__(self, update: Update) -> Tensor:
        """Make the update and return the loss at the weights before it."""
        update.optimizer.zero_grad()
        loss = update.backward()
        weights = moving_weights(update.network)
        factor = float(self.params["rho"]) / (gradient_norm(weights) + TINY) - float(self.params["alpha"])
        with perturbed(update.network, weights, factor, str(self.params["space"])):
            update.backward()  # adds to the gradients that are there
        update.optimizer.step()
        return loss
