"""A bound on the size of a network that is built for a file that nobody trusts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from qtdog.core.errors import ModelError

ROOM = 2
"""How many times the values of a file a network may register: tied weights do so twice."""
SPARE_VALUES = 2**20


@contextlib.contextmanager
def at_most(n_values: int, what: str) -> Iterator[None]:
    """Refuse modules that register far more than `n_values` parameters and buffers while the block runs.

    A layer registers a weight before it is first written to, so that one which is refused has taken no memory.

    Args:
        n_values: expected in the whole network.
        what: what is built, for the error.

    Raises:
        ModelError: the network is larger.

    Example:
        >>> from torch import nn
        >>> with at_most(100, "the file"):
        ...     nn.Linear(9, 10).bias.shape
        torch.Size([10])
    """
    limit, found = ROOM * n_values + SPARE_VALUES, 0

    def count(_module: object, name: str, value: Tensor | None) -> None:
        nonlocal found
        found += 0 if value is None else value.numel()
        if found > limit:
            text = f"{what} does not fit: it holds {n_values:,} values, the network that it names has more than"
            raise ModelError(f"{text} {limit:,}. The file is damaged, or not what it says")

    handles = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
