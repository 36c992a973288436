"""Linear heads of an objective's own, with a start that the seed decides."""

from __future__ import annotations

import torch
from torch import nn

from qtdog.core.random import derive


def linear_head(n_features: int, n_classes: int, seed: int, name: str) -> nn.Linear:
    """Return a linear layer; its random start is that of the stream called `name`, global state is left alone.

    Example:
        >>> one, other = (linear_head(4, 2, seed=0, name="style") for _ in range(2))
        >>> torch.equal(one.weight, other.weight)
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "init", name))
        return nn.Linear(n_features, n_classes)
