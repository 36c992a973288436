"""Look at what the stages of a network give, or change it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from qtdog.core.feature_maps import Stage

Act = Callable[[Stage, Tensor], Tensor | None]
"""(stage, its feature map) to the map that takes its place, or None to leave it."""


@contextlib.contextmanager
def at_stages(network: nn.Module, stages: Sequence[Stage], act: Act) -> Iterator[None]:
    """Call `act` on the feature map of each stage in every forward pass inside the block.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Identity(), nn.Flatten())
        >>> with at_stages(network, [Stage("0", 1, axis=1, ndim=4)], lambda stage, features: features + 1):
        ...     network(torch.zeros(1, 1, 1, 2))
        tensor([[1., 1.]])
    """

    def hook(stage: Stage) -> Any:
        return lambda module, inputs, output: act(stage, output)

    with contextlib.ExitStack() as stack:
        for stage in stages:
            stack.enter_context(network.get_submodule(stage.name).register_forward_hook(hook(stage)))
        yield


@contextlib.contextmanager
def kept_at_stages(network: nn.Module, stages: Sequence[Stage]) -> Iterator[list[Tensor]]:
    """Yield a list into which a forward pass inside the block puts the feature map of each stage, in order.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Identity(), nn.Flatten())
        >>> with kept_at_stages(network, [Stage("0", 1, axis=1, ndim=4)]) as maps:
        ...     _ = network(torch.zeros(1, 1, 1, 2))
        >>> [tuple(found.shape) for found in maps]
        [(1, 1, 1, 2)]
    """
    maps: list[Tensor] = []
    with at_stages(network, stages, lambda stage, features: maps.append(features)):
        yield maps
