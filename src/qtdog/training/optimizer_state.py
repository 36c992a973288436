"""An optimizer's state as plain tensors and JSON, by the names of the parameters, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qtdog.conversion.attach import sites

SEPARATOR = "|"


def plain_names(network: nn.Module, objective: nn.Module | None = None) -> dict[int, str]:
    """Return id → name of every parameter, by the names of the plain network, whatever quantizers are attached.

    A weight keeps the name that it has without quantizers; the parameters of a quantizer are `WEIGHT@NAME`, those of
    the objective `objective:NAME`. So a run can go on from the state of another that differs in its quantizer.
    """
    names = {id(value): name for name, value in network.named_parameters()}
    for site in reversed(list(sites(network))):  # the first name of a shared weight counts, as in the plain network
        names[id(site.weight)] = site.plain_name
        names |= {id(value): f"{site.plain_name}@{name}" for name, value in site.quantizer.named_parameters()}
    if objective is not None:
        names |= {id(value): f"objective:{name}" for name, value in objective.named_parameters()}
    return names


def flatten_optimizer(optimizer: Optimizer, names: Mapping[int, str]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the state as tensors named `parameter|key`, and the hyper-parameters of each group."""
    tensors = {
        f"{names[id(parameter)]}{SEPARATOR}{key}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, groups


def restore_optimizer_(
    optimizer: Optimizer, names: Mapping[int, str], tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Put back what `flatten_optimizer` took.

    Raises:
        ValueError: the optimizer has another number of groups.
        KeyError: state of a parameter that it does not hold.
    """
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"expected {len(optimizer.param_groups)} parameter groups, found {len(groups)}")
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    restore_moments_(optimizer, names, tensors)


def restore_moments_(optimizer: Optimizer, names: Mapping[int, str], tensors: dict[str, Tensor]) -> None:
    """Put back the state of every parameter, leaving the hyper-parameters of the groups as they are.

    Each moment gets the memory format of its parameter: with other strides torch takes other vector code, and the last
    bits of a resumed run would differ.

    Raises:
        KeyError: state of a parameter that the optimizer does not hold.
    """
    parameters = {names[id(value)]: value for group in optimizer.param_groups for value in group["params"]}
    optimizer.state.clear()
    for name, value in tensors.items():
        owner, key = name.rsplit(SEPARATOR, 1)
        parameter = parameters[owner]
        # A copy: Adam counts steps in place, and several runs may begin from one checkpoint.
        moment = value.clone() if value.shape != parameter.shape else torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = moment.detach()
