"""An optimizer's state as plain tensors and JSON, and back, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def flatten_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the state as tensors named `parameter-index.key`, and the hyper-parameters of each group."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": value
        for index, entries in state["state"].items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    return tensors, groups


def restore_optimizer_(optimizer: Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """Put back what `flatten_optimizer` took.

    Each moment gets the memory format of its parameter: with other strides torch takes other vector code, and the last
    bits of a resumed run would differ.

    Raises:
        ValueError: the optimizer has another number of groups.
    """
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"expected {len(optimizer.param_groups)} parameter groups, found {len(groups)}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    optimizer.state.clear()
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        moment = value if value.shape != parameter.shape else torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = moment.detach()
