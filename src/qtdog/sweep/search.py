"""Random search: hyper-parameters drawn from the ranges that the members of an axis declare."""

from __future__ import annotations

from typing import Any

from qtdog.core.config import Config
from qtdog.core.config_io import Tree
from qtdog.core.random import numpy_stream
from qtdog.core.registry import HyperParameter
from qtdog.sweep.study import Search
from qtdog.training.build import OBJECTIVES, STEP_RULES

# Ranges of DomainBed for data sets of photographs (Gulrajani and Lopez-Paz, ICLR 2021, appendix D.4): 10^U(-5, -3.5),
# 2^U(3, 5.5), 10^U(-6, -2).
PROTOCOL = {
    "lr": ("optimizer", "lr", HyperParameter(5e-5, "learning rate", search=(1e-5, 10**-3.5), log=True)),
    "batch_size": ("data", "batch_size", HyperParameter(32, "images per domain", search=(8, 2**5.5), log=True)),
    "weight_decay": (
        "optimizer",
        "weight_decay",
        HyperParameter(0.0, "weight decay", search=(1e-6, 1e-2), log=True),
    ),
}


def drawn(search: Search, index: int, config: Config) -> Tree:
    """Return what draw number `index` of a search sets, as a tree for `build_config`; nothing for draw 0.

    What is drawn for a key depends on (seed, index, key) alone, so that methods get the same learning rate in the same
    draw. What the configuration sets itself for an objective or step rule is not drawn.

    Args:
        search: how many draws, and of what.
        index: of the draw.
        config: that the draw goes on top of: its objective and step rule declare the ranges.

    Raises:
        ConfigError: an unknown objective or step rule.

    Example:
        >>> from qtdog.core.config_io import build_config
        >>> coral, search = build_config([{"objective": {"name": "coral"}}]), Search(n=3, over=["objective", "lr"])
        >>> drawn(search, 0, coral), sorted(drawn(search, 1, coral))
        ({}, ['objective', 'optimizer'])
    """
    tree: Tree = {}
    if index == 0:
        return tree
    for name, (section, key, how) in PROTOCOL.items():
        if name in search.over:
            tree.setdefault(section, {})[key] = how.draw(numpy_stream(search.seed, "search", index, name))
    members: dict[str, Any] = {"objective": (OBJECTIVES, config.objective), "step_rule": (STEP_RULES, config.step_rule)}
    for axis, (registry, chosen) in members.items():
        if axis not in search.over:
            continue
        known = registry[chosen.name].HYPERPARAMETERS
        values = {
            name: how.draw(numpy_stream(search.seed, "search", index, axis, name))
            for name, how in known.items()
            if name not in chosen.params and (how.search is not None or how.choices)
        }
        if values:
            tree[axis] = {"params": chosen.params | values}
    return tree
