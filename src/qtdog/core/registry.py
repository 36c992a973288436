"""Names to factories: how an axis of the configuration finds its members."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from qtdog.core.errors import ConfigError, unknown

T = TypeVar("T")
Member = TypeVar("Member")


class Registry(Generic[T]):
    """A table of named members of one axis (objectives, quantizers, …).

    Example:
        >>> letters = Registry[str]("letter")
        >>> letters.add("a", "alpha")
        'alpha'
        >>> letters["a"]
        'alpha'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._members: dict[str, T] = {}

    def add(self, name: str, member: T) -> T:
        """Enter `member` under `name` and return it; a name can be taken once (ValueError)."""
        if name in self._members:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._members[name] = member
        return member

    def register(self, name: str) -> Callable[[Member], Member]:
        """Return a decorator that enters its function or class, a T, under `name`."""

        def enter(member: Member) -> Member:  # of its own type, not T: a class keeps its attributes for type checkers
            self.add(name, cast(T, member))
            return member

        return enter

    def __getitem__(self, name: str) -> T:
        """Return the member called `name`; ConfigError with the nearest match if there is none."""
        if name not in self._members:
            raise ConfigError(unknown(self.kind, name, self._members))
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, sorted."""
        return iter(sorted(self._members))


def import_members(package: str) -> None:
    """Import every module of a package, so that each member of an axis enters its name: a new one is just a file."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
