"""Several members of one ensemble: how `train` plans them, lets them share a beginning, and joins them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, RunError
from qtdog.core.files import write_atomic
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.runs.folder import RunFolder
from qtdog.training.checkpoint import Checkpoint
from qtdog.training.fork import train_prefix
from qtdog.training.resume import reseeded
from qtdog.training.run import Voice


@dataclass(frozen=True)
class Crew:
    """What the members of an ensemble share.

    Attributes:
        members: how many; their seeds count up from the configuration's.
        splits: "same" held-out images for all, or "different" (data.trial counts up too).
        fork_at: where they part: "start" (of quantization) or a step; None to train each from its own start.
    """

    members: int = 1
    splits: str = "same"
    fork_at: str | None = None

    @property
    def until(self) -> int | None:
        """The step at which the members part; None for the start of quantization."""
        return None if self.fork_at in (None, "start") else int(self.fork_at)

    def check(self) -> None:
        """Refuse choices that do not go together.

        Raises:
            ConfigError: naming the flags.
        """
        if self.fork_at not in (None, "start") and not self.fork_at.isdecimal():
            raise ConfigError(f"--fork-at takes 'start' (of quantization) or a step, not '{self.fork_at}'")
        if self.members == 1 and (self.fork_at or self.splits != "same"):
            raise ConfigError("--fork-at and --member-splits are for several members: add --members 5")
        if self.fork_at and self.splits != "same":
            raise ConfigError("members that share their first steps share their images: leave out one of --fork-at, "
                              "--member-splits different")  # fmt: skip


@dataclass(frozen=True)
class Beginning:
    """The float steps that several runs share.

    Attributes:
        config: of the first of them.
        folder: where they are kept.
        until: how many; None for up to the start of quantization.
    """

    config: Config
    folder: RunFolder
    until: int | None

    @property
    def step(self) -> int:
        """How many steps are shared."""
        return self.until or self.config.start_step or 0

    def checkpoint(self, config: Config, dataset: DomainDataset, voice: Voice) -> Checkpoint:
        """Return where the run of `config` begins, trained now unless that was done before.

        Raises:
            ConfigError, RunError: as in `training.fork.train_prefix`.
        """
        made = train_prefix(self.config, dataset, self.folder, until=self.until, voice=voice)
        return reseeded(made, config.train.seed)

    def check(self, result: dict[str, Any], folder: RunFolder) -> None:
        """Refuse a finished run that has another beginning: its configuration does not show it.

        Raises:
            RunError: naming the folder.
        """
        found = result.get("forked_from_step", 0), result.get("forked_from_seed")
        if found != (self.step, self.config.train.seed):
            text = f"{folder.path} holds a run that did not begin from the {self.step} steps in {self.folder.path}"
            raise RunError(f"{text}; choose another --out")


def keep_plan(out: Path, config: Config, crew: Crew) -> None:
    """Remember what several runs in one folder were asked for, so that `--resume --out` is enough to go on."""
    tree = {"config": config.model_dump(mode="json"), "crew": asdict(crew)}
    write_atomic(out / "plan.json", json.dumps(tree, indent=1))


def read_plan(out: Path) -> tuple[dict[str, Any], Crew] | None:
    """Return the configuration tree and the crew that `keep_plan` wrote; None if it did not.

    Raises:
        RunError: the file is damaged.
    """
    file = out / "plan.json"
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_text())
        return tree["config"], Crew(**tree["crew"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged ({error}); delete it, and give the flags again with --resume") from error


def join_crew(
    dataset: DomainDataset, folders: Sequence[Path], out: Path | None, progress: Progress = None
) -> dict[str, Any]:
    """Return the result of the ensemble of finished runs that have one target, made and measured now if need be.

    Args:
        dataset: the data that they were trained on.
        folders: the run folders.
        out: folder of the ensemble's folder; None for `runs`.
        progress: of decoding images.

    Raises:
        ConfigError, RunError: as in `ensemble.assemble.assemble`.
    """
    from qtdog.cli.console import warn
    from qtdog.ensemble.assemble import Order, assemble, finished, members_hash
    from qtdog.ensemble.evaluation import open_exam
    from qtdog.ensemble.members import KINDS, fitting_kind, read_member, share_splits

    members = [read_member(folder) for folder in folders]
    kind = fitting_kind(members)
    name = members[0].config.data.target.replace("/", "_")
    folder = Path("runs") / f"{kind}-{members_hash(members, kind)}" if out is None else out / f"{name}-{kind}"
    order = Order(kind, folder / "model.safetensors")
    result = finished(members, order)
    if result is None:
        exam = open_exam(members[0].config, dataset, same_splits=share_splits(members), progress=progress)
        result = assemble(members, order, exam, warn=warn)
    return result | {"method": f"{KINDS[kind].title} of {len(members)}", "folder": str(folder)}
