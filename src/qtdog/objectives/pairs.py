"""Pairs of domains: all of them, or a random ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def mean_over_pairs(distance: Callable[[T, T], Tensor], domains: Sequence[T]) -> Tensor:
    """Return the mean of `distance` over all unordered pairs of two or more domains.

    Example:
        >>> mean_over_pairs(lambda x, y: (x - y).abs(), torch.tensor([0.0, 1.0, 5.0]).unbind())  # of 1, 5 and 4
        tensor(3.3333)
    """
    return torch.stack([distance(one, other) for one, other in combinations(domains, 2)]).mean()


def random_ring(n: int) -> list[tuple[int, int]]:
    """Return n pairs of neighbours on a ring of n domains in random order: each domain is first once, second once.

    Drawn from torch's global state, which the training loop seeds for every step.

    Example:
        >>> pairs = random_ring(4)
        >>> sorted(first for first, _ in pairs) == sorted(second for _, second in pairs) == [0, 1, 2, 3]
        True
    """
    order = torch.randperm(n).tolist()
    return list(zip(order, order[1:] + order[:1], strict=True))
