"""Tensors that have several names: stored once, handed out under every name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor

from qtdog.core.quantized import QuantizedTensor

Value = QuantizedTensor | Tensor


def find_aliases(values: Mapping[str, Value]) -> dict[str, str]:
    """Return every further name of a value, with the name (the first in spelling) under which it is stored.

    Two names mean one value if they mean one quantized tensor object, or tensors that view the same memory alike.

    Example:
        >>> import torch
        >>> weight = torch.ones(2)
        >>> find_aliases({"head": weight, "embedding": weight, "bias": torch.ones(2)})
        {'head': 'embedding'}
    """
    first: dict[Hashable, str] = {}
    owners = {name: first.setdefault(_identity(values[name]), name) for name in sorted(values)}
    return {name: owner for name, owner in owners.items() if name != owner}


def _identity(value: Value) -> Hashable:
    if isinstance(value, QuantizedTensor) or value.numel() == 0:
        return id(value)
    return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
