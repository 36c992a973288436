"""Names to factories: how an axis of the configuration finds its members, and their hyper-parameters as data."""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from qtdog.core.errors import ConfigError, nearest, unknown

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
Member = TypeVar("Member")


class Registry(Generic[T]):
    """A table of named members of one axis (objectives, quantizers, …).

    Where the members of an axis stand in the files of a package, a file is imported when one of its members is asked
    for: first the file that `files` names or that has the member's name, and all files if that does not enter it. A new
    member is just a file, or a class in one.

    Args:
        kind: what a member is, for errors.
        package: whose modules register the members; "" if they are registered elsewhere.
        files: the members of each file that holds several, by the file's name.
        members: the first ones.

    Example:
        >>> letters = Registry[str]("letter")
        >>> letters.add("a", "alpha")
        'alpha'
        >>> letters["a"]
        'alpha'
    """

    def __init__(
        self,
        kind: str,
        package: str = "",
        files: Mapping[str, Sequence[str]] | None = None,
        members: Mapping[str, T] | None = None,
    ) -> None:
        self.kind = kind
        self._files = {name: file for file, names in (files or {}).items() for name in names}
        self._package = package  # empty once all its modules are imported
        self._members: dict[str, T] = dict(members or {})
        self._foreign: set[str] = set()

    def add(self, name: str, member: T) -> T:
        """Enter `member` under `name` and return it; a name can be taken once (ValueError)."""
        if name in self._members:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._members[name] = member
        return member

    def add_foreign(self, name: str, member: T) -> None:
        """Enter a plug-in's member; it may take the name of another plug-in's (ConfigError for a built-in one's)."""
        self._import_all()
        if name in self._members and name not in self._foreign:
            raise ConfigError(f"{self.kind} '{name}' is built in; choose another name")
        self._members[name] = member
        self._foreign.add(name)

    def remove_foreign(self) -> None:
        """Remove the members that plug-ins entered."""
        for name in self._foreign:
            self._members.pop(name, None)
        self._foreign.clear()

    def register(self, name: str) -> Callable[[Member], Member]:
        """Return a decorator that enters its function or class, a T, under `name`."""

        def enter(member: Member) -> Member:  # of its own type, not T: a class keeps its attributes for type checkers
            self.add(name, cast(T, member))
            return member

        return enter

    def __getitem__(self, name: str) -> T:
        """Return the member called `name`; ConfigError with the nearest match if there is none."""
        if name not in self._members and self._package:
            stem = self._files.get(name, name.replace("-", "_"))
            if stem.isidentifier() and importlib.util.find_spec(f"{self._package}.{stem}") is not None:
                importlib.import_module(f"{self._package}.{stem}")
        if name not in self._members:
            self._import_all()
        if name not in self._members:
            raise ConfigError(unknown(self.kind, name, self._members))
        return self._members[name]

    def _import_all(self) -> None:
        package, self._package = self._package, ""
        if package:
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                importlib.import_module(f"{package}.{module.name}")

    def name_of(self, member: object) -> str:
        """Return the name under which a class or function is registered; its own if it is not (a subclass, say)."""
        return next((name for name, one in self._members.items() if one is member), getattr(member, "__name__", "?"))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, sorted."""
        self._import_all()
        return iter(sorted(self._members))


Value = bool | int | float | str


@dataclass(frozen=True)
class HyperParameter:
    """One number (or choice) that a member of an axis takes.

    Attributes:
        default: the published or DomainBed's default; its type is the type of the values.
        about: what it means, in words.
        low: smallest value that makes sense.
        high: largest value.
        search: range of DomainBed's random search, or None if it is not searched.
        log: whether the search is uniform in the logarithm.
        choices: the values of a choice; then low, high and search do not count.
    """

    default: Value
    about: str
    low: float = -float("inf")
    high: float = float("inf")
    search: tuple[float, float] | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()

    def draw(self, rng: np.random.Generator) -> Value:
        """Return a random value for a search (the default if it is not searched)."""
        import numpy as np  # not above: the command line imports this file to answer --help

        if self.choices:
            return self.choices[int(rng.integers(len(self.choices)))]
        if self.search is None:
            return self.default
        low, high = self.search
        drawn = float(np.exp(rng.uniform(np.log(low), np.log(high))) if self.log else rng.uniform(low, high))
        return round(drawn) if isinstance(self.default, int) else drawn


HyperParameters = Mapping[str, HyperParameter]


def fill(kind: str, known: HyperParameters, given: Mapping[str, Value]) -> dict[str, Value]:
    """Return the value of every hyper-parameter: what is given, checked, and the defaults.

    Args:
        kind: what they belong to, for the error ("objective 'coral'").
        known: the hyper-parameters.
        given: some of their values.

    Raises:
        ConfigError: an unknown name (with the nearest match), a value of another type or out of range.

    Example:
        >>> known = {"weight": HyperParameter(1.0, "of the penalty", low=0)}
        >>> fill("objective 'coral'", known, {}), fill("objective 'coral'", known, {"weight": 2})
        ({'weight': 1.0}, {'weight': 2.0})
    """
    for name in given:
        if name not in known:
            close = nearest(name, known)
            hint = f"; did you mean '{close}'?" if close else "."
            raise ConfigError(f"{kind} has no hyper-parameter '{name}'{hint} It has: {', '.join(known) or 'none'}")
    return {
        name: _checked(f"{name} of {kind}", declared, given[name]) if name in given else declared.default
        for name, declared in known.items()
    }


def _checked(what: str, declared: HyperParameter, value: Value) -> Value:
    if declared.choices:
        if value not in declared.choices:
            raise ConfigError(unknown(what, str(value), [str(choice) for choice in declared.choices]))
        return value
    kind = type(declared.default)
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{what} must be {kind.__name__}, not {value!r}")
    if isinstance(value, (int, float)) and not declared.low <= value <= declared.high:
        raise ConfigError(f"{what} must lie in {declared.low:g} … {declared.high:g}, not {value:g}")
    return float(value) if kind is float else value
