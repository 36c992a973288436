"""What can be made of several finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qtdog.core.errors import ConfigError
from qtdog.core.registry import Registry
from qtdog.ensemble.member import Member


@dataclass(frozen=True)
class Kind:
    """One way to make a model of several.

    Attributes:
        title: for tables.
        about: one line for people.
        members: what a member must be: "quantized", "averaged", "float" or "any".
        one_model: whether the result is one network; else all members are kept and asked.
    """

    title: str
    about: str
    members: str
    one_model: bool = False


KINDS: Registry[Kind] = Registry("kind of ensemble")
KINDS.add("eoq", Kind("EoQ", "Ensemble of quantized models: argmax of the mean logits (paper, Eq. 6).", "quantized"))
KINDS.add("eoa", Kind("EoA", "Ensemble of moving averages (Arpit et al., 2022): the mean of their logits.", "averaged"))
KINDS.add("ensemble", Kind("ensemble", "Deep ensemble of float models: the mean of their logits.", "float"))
KINDS.add(
    "diwa",
    Kind("DiWA", "One float model: the mean of the members' weights (Ramé et al., 2022).", "any", one_model=True),
)
KINDS.add(
    "soup",
    Kind("soup", "One quantized model: the mean of the latent weights, quantized anew.", "quantized", one_model=True),
)


def fitting_kind(members: Sequence[Member]) -> str:
    """Return the kind of ensemble that such members make: `eoq`, `eoa` or `ensemble`.

    Raises:
        ConfigError: quantized and float members together.
    """
    for name in ("eoq", "eoa", "ensemble"):
        if all(KINDS[name].members in member.traits for member in members):
            return name
    raise ConfigError("the members are of several kinds (quantized, float, averaged): give those of one kind")


def check_kind(name: str, members: Sequence[Member]) -> None:
    """Refuse members that the kind called `name` is not made of.

    Raises:
        ConfigError: an unknown kind, or a member of another sort; the text names it.
    """
    needed = KINDS[name].members
    for member in members:
        if needed not in member.traits:
            sorts = " and ".join(trait for trait in member.traits if trait != "any")
            raise ConfigError(f"--kind {name} takes {needed} members; {member.path} is {sorts}")
