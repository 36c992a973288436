"""The scale of losses under float16, whose gradients would else be flushed to zero (Micikevicius et al., ICLR 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

FIRST = 2.0**16
GROWS_AFTER = 2000
"""Both are those of `torch.amp.GradScaler`."""


class GradientOverflow(Exception):
    """A scaled gradient is not finite; the update is left out, and the next one has half of the scale.

    Attributes:
        loss: of the batch, a scalar.
    """

    def __init__(self, loss: Tensor) -> None:
        super().__init__()
        self.loss = loss


class LossScale(nn.Module):
    """Multiplies losses, and divides what a backward pass adds to the gradients, so that nobody sees the scale.

    A step rule may compare and combine gradients, which torch's own scaler would show it scaled. The scale is a power
    of two, and so the division is exact. It is halved where a gradient overflows, and doubled after 2,000 updates
    without. It belongs to the objective as a module, and is saved, resumed and forked with its state.

    Example:
        >>> scale, weight = LossScale(), nn.Parameter(torch.tensor([2.0]))
        >>> weight.grad = torch.tensor([1.0])
        >>> def pass_over():
        ...     (3 * weight * scale.factor).sum().backward()
        ...     return torch.tensor(6.0)
        >>> scale.add_gradients([weight], pass_over), weight.grad
        (tensor(6.), tensor([4.]))
    """

    factor: Tensor
    n_clean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(FIRST))
        self.register_buffer("n_clean", torch.tensor(0))

    def add_gradients(self, parameters: Sequence[nn.Parameter], pass_over: Callable[[], Tensor]) -> Tensor:
        """Return the loss of a pass that adds gradients of `factor` times the loss; what it adds is divided by it.

        Args:
            parameters: all that train.
            pass_over: runs forward and backward, and returns the loss itself, a scalar.

        Raises:
            GradientOverflow: a gradient is not finite; those from before the pass are lost.
        """
        before = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, _ in before:
            parameter.grad = None
        loss = pass_over()
        added = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # the one wait for the device that float16 costs: whether to step is a question of Python
        if not torch.isfinite(torch.nn.utils.get_total_norm(added)):
            self.factor /= 2
            self.n_clean.zero_()
            raise GradientOverflow(loss)
        for gradient in added:
            gradient /= self.factor
        for parameter, gradient in before:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss

    def after_update(self) -> None:
        """Count an update without an overflow; the device does it, and nothing waits."""
        self.n_clean += 1
        grows = self.n_clean >= GROWS_AFTER
        self.factor *= 1 + grows.to(self.factor.dtype)
        self.n_clean *= ~grows
