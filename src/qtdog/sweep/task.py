"""One piece of work of a sweep: a run, float steps that runs share, or an ensemble."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qtdog.core.config import Config
from qtdog.sweep.study import Labels

Kind = Literal["prefix", "run", "ensemble"]


@dataclass(frozen=True)
class Join:
    """What an ensemble is made of.

    Attributes:
        kind: a name of `ensemble.members.KINDS`.
        members: folder names of the runs.
        pick: which of them diwa and soup average.
    """

    kind: str
    members: tuple[str, ...]
    pick: str = "uniform"


@dataclass(frozen=True)
class Task:
    """One piece of work; its folder below the sweep's has its name.

    Attributes:
        name: `<hash>` of a run, `prefix-<hash>`, or `<kind>-<hash>` of an ensemble.
        kind: what it is.
        rank: tasks of a lower rank come first.
        labels: method, target, seed and the study's other axes; several where methods come to the same run.
        config: of a run or prefix.
        step: of a prefix, the updates to make; of a run, those that it takes over from `begin`.
        begin: the folder whose checkpoint it begins from; "" to train from step 0.
        after: the run that makes this one's updates with its own (`sweep.sharing.share_updates`); "" if none does.
        along: of such a run, the names and configurations of those whose updates it makes.
        join: of an ensemble.
    """

    name: str
    kind: Kind
    rank: int
    labels: tuple[Labels, ...] = ()
    config: Config | None = field(default=None, repr=False)
    step: int = 0
    begin: str = ""
    after: str = ""
    along: tuple[tuple[str, Config], ...] = field(default=(), repr=False)
    join: Join | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the tasks that must be finished before this one."""
        return self.join.members if self.join else ((self.begin,) if self.begin else ())

    @property
    def steps(self) -> int:
        """Updates that the task makes; 0 for an ensemble, and for a run whose updates another one makes."""
        if self.config is None or self.after:
            return 0
        return self.step if self.kind == "prefix" else self.config.train.steps - self.step

    def to_json(self) -> dict[str, Any]:
        """Return what a worker needs to do it."""
        config = None if self.config is None else self.config.model_dump(mode="json")
        join = None if self.join is None else vars(self.join) | {"members": list(self.join.members)}
        return {
            "name": self.name,
            "kind": self.kind,
            "rank": self.rank,
            "labels": list(self.labels),
            "config": config,
            "step": self.step,
            "begin": self.begin,
            "after": self.after,
            "along": [[name, config.model_dump(mode="json")] for name, config in self.along],
            "join": join,
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Task:
        """Return the task that `to_json` described."""
        config = None if tree["config"] is None else Config.model_validate(tree["config"])
        join = None if tree["join"] is None else Join(**tree["join"] | {"members": tuple(tree["join"]["members"])})
        along = tuple((name, Config.model_validate(one)) for name, one in tree["along"])
        return cls(**tree | {"config": config, "join": join, "labels": tuple(tree["labels"]), "along": along})

    def folder(self, out: Path) -> Path:
        """Return its folder in the sweep's folder."""
        return out / self.name
