"""What every weight quantizer is: a parametrization that passes weights through until it is enabled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from qtdog.core.quantized import QuantizedTensor, QuantSpec


class Quantizer(nn.Module, ABC):
    """A weight parametrization; abstract.

    Its parameters and buffers exist from the start, so that optimizer groups and checkpoint keys never change during a
    run. While `enabled` is False the weight passes through untouched. `enabled` is a plain flag, no part of the state
    dict: who restores a checkpoint restores it too.

    In evaluation mode `forward` returns the weight that ships: on its grid where the member has one (`packs`), whatever
    training adds (noise, stochastic rounding).

    Attributes:
        CLIPS: whether weights on or beyond the ends of the grid get no gradient.
        spec: bits, the axis of the step sizes, and the levels.
        enabled: whether the forward pass does what the member is for.
    """

    CLIPS: ClassVar[bool] = True

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = False
        self._seed: int | None = None

    @property
    def packs(self) -> bool:
        """Whether the weight now lies on a grid, so that `quantized` gives its codes; else it ships in float."""
        return self.enabled

    @property
    def shippable(self) -> bool:
        """Whether a checkpoint taken now may be selected."""
        return self.enabled

    @abstractmethod
    def enable_(self, weight: Tensor) -> None:
        """Initialise from the current `weight` and do from now on what the member is for."""

    def begin_step_(self, weight: Tensor, seed: int, progress: float) -> None:
        """Prepare for one update; called before each one once enabled.

        Args:
            weight: the weight, which a member may change in place.
            seed: of everything random in this step; all passes of one step see the same draws.
            progress: share of the quantized steps that are done, 0 at the first and below 1 at the last.
        """
        self._seed = seed

    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes and step sizes whose product is exactly what `forward(weight)` returns in evaluation mode.

        Raises:
            RuntimeError: the member has no grid, or not yet (`packs` is False).
        """
        raise RuntimeError(f"{type(self).__name__} has no codes")

    def step_sizes(self) -> Tensor | None:
        """Return the step sizes in use, float32, shape (n,), or None if the member has none."""
        return None

    def step_change(self) -> Tensor | None:
        """Return each step size as a multiple of its start, shape (n,), or None if step sizes do not move."""
        return None

    def uniform(self, weight: Tensor) -> Tensor:
        """Return draws from U(-1/2, 1/2), float32, in the shape, device and memory format of `weight`.

        The same draws in every pass of one step; without `begin_step_` (somebody's own loop) from torch's global state.
        """
        if self._seed is None:
            return torch.rand_like(weight, dtype=torch.float32) - 0.5
        generator = torch.Generator(weight.device).manual_seed(self._seed)
        drawn = torch.rand(weight.shape, generator=generator, device=weight.device, dtype=torch.float32)
        return torch.empty_like(weight, dtype=torch.float32).copy_(drawn) - 0.5

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the quantizer."""
        return f"bits={self.spec.bits}, axis={self.spec.axis}, enabled={self.enabled}"
