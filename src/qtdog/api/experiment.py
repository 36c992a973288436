"""From what a user asked for to finished runs: targets, members of ensembles, fork points; results and tables.

`make_plan` says which runs it takes, `train_runs` makes them, `join_targets` puts their ensembles together. The command
line and `qtdog.train` both stand on these three.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qtdog.api.budget import Budget, choose, fits, taken_over, taken_over_text
from qtdog.api.display import TrainingBar
from qtdog.core.config import Config, config_hash
from qtdog.core.config_io import (
    SHORT_NAMES,
    Tree,
    build_config,
    is_method_preset,
    load_preset,
    merge_trees,
    option_tree,
    parse_assignment,
    preset_plugins,
)
from qtdog.core.errors import ConfigError, RunError
from qtdog.core.files import safe_name, write_atomic
from qtdog.core.progress import Progress
from qtdog.core.safe_text import read_json
from qtdog.data.dataset import DomainDataset
from qtdog.data.open import IN_PYTHON, open_any, recorded_source, without_unreadable
from qtdog.report.render import markdown
from qtdog.report.tables import cost_table, target_table
from qtdog.runs.finished import KINDS, method_name
from qtdog.runs.folder import RunFolder
from qtdog.training.checkpoint import Checkpoint
from qtdog.training.loggers import with_loggers
from qtdog.training.plugins import load_entry_points, load_plugins, with_plugins
from qtdog.training.protocol import dataset_layer, known_target, resolve
from qtdog.training.run import RunCallbacks, run, train_fork_point
from qtdog.training.shared_steps import reseeded


@dataclass(frozen=True)
class Members:
    """How many runs that differ in their seed are trained for each target, and what they share.

    Attributes:
        number: how many; their seeds count up from the configuration's.
        splits: "same" validation images for all, or "different" (data.trial counts up too).
        fork_at: where they part: "start" (of quantization) or a step; None to train each from its own start.
    """

    number: int = 1
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
        if self.number == 1 and (self.fork_at or self.splits != "same"):
            raise ConfigError("--fork-at and --member-splits are for several members: add --members 5")
        if self.fork_at and self.splits != "same":
            raise ConfigError("members that share their first steps share their images: leave out one of --fork-at, "
                              "--member-splits different")  # fmt: skip


@dataclass(frozen=True)
class ForkPoint:
    """The float checkpoint from which several runs begin.

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

    def checkpoint(self, config: Config, dataset: DomainDataset, callbacks: RunCallbacks) -> Checkpoint:
        """Return where the run of `config` begins, trained now unless that was done before.

        Raises:
            ConfigError, RunError: as in `training.run.train_fork_point`.
        """
        made = train_fork_point(self.config, dataset, self.folder, until=self.until, callbacks=callbacks)
        return reseeded(made, config.train.seed)

    def check(self, result: dict[str, Any], folder: RunFolder) -> None:
        """Refuse a finished run that began elsewhere: its configuration does not show it.

        Raises:
            RunError: naming the folder.
        """
        found = result.get("forked_from_step", 0), result.get("forked_from_seed")
        if found != (self.step, self.config.train.seed):
            text = f"{folder.path} holds a run that did not begin from the {self.step} steps in {self.folder.path}"
            raise RunError(f"{text}; choose another --output")


def keep_plan(out: Path, config: Config, members: Members) -> None:
    """Remember what several runs in one folder were asked for, so that `--resume --output` is enough to go on."""
    tree = {"config": config.model_dump(mode="json"), "members": asdict(members)}
    write_atomic(out / "plan.json", json.dumps(tree, indent=1))


def read_plan(out: Path) -> tuple[dict[str, Any], Members] | None:
    """Return the configuration tree and the members that `keep_plan` wrote; None if it did not.

    Raises:
        RunError: the file is damaged.
    """
    file = out / "plan.json"
    if not file.is_file():
        return None
    try:
        tree = read_json(file)
        if "crew" in tree:  # as the first version wrote it
            number, splits, fork_at = (tree["crew"][key] for key in ("members", "splits", "fork_at"))
            return tree["config"], Members(number, splits, fork_at)
        return tree["config"], Members(**tree["members"])
    except RunError as error:
        raise RunError(f"{error}; delete it, and give the flags again with --resume") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged ({error}); delete it, and give the flags again with --resume") from error


def join_members(
    dataset: DomainDataset,
    folders: Sequence[Path],
    out: Path | None,
    progress: Progress = None,
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
    # one run needs none of this
    from qtdog.ensemble.assemble import EnsembleSpec, assemble, finished, members_hash
    from qtdog.ensemble.model import fitting_kind, read_member, share_splits
    from qtdog.ensemble.scoring import open_evaluation_set

    members = [read_member(folder) for folder in folders]
    kind = fitting_kind(members)
    name = safe_name(members[0].config.data.target)
    folder = Path("runs") / f"{kind}-{members_hash(members, kind)}" if out is None else out / f"{name}-{kind}"
    spec = EnsembleSpec(kind, folder / "model.safetensors")
    result = finished(members, spec)
    if result is None:
        evaluation_set = open_evaluation_set(
            members[0].config, dataset, same_splits=share_splits(members), progress=progress
        )
        result = assemble(members, spec, evaluation_set)
    return result | {"method": f"{KINDS[kind].title} of {len(members)}", "folder": str(folder)}


FLAGS = tuple(SHORT_NAMES)  # options of the command line that name a configuration value


@dataclass(frozen=True)
class Planned:
    """One run to make.

    Attributes:
        config: effective.
        folder: where.
        fork_point: the float checkpoint that it begins from with other runs; None to train from its own start.
    """

    config: Config
    folder: RunFolder
    fork_point: ForkPoint | None = None


@dataclass(frozen=True)
class Request:
    """What the user asked `train` for.

    Attributes:
        flags: options by name, as `core.config_io.option_tree` takes them; None where not given.
        presets: names, files or trees, later ones on top.
        assignments: the texts of `--set`, or trees; they win over everything else.
        members: how many runs that differ in their seed, and what they share.
        out: the run folder, or the folder of run folders if there are several; None for `runs/`.
        resume: go on with what is there.
        plugins: files of plug-ins, run now (`training.plugins`).
        budget: how long it may take; None to take sizes and lengths as they are.
        dataset: the data, if it is an object and not something that `flags["data"]` names.
    """

    flags: Mapping[str, Any]
    presets: Sequence[str | Tree] = ()
    assignments: Sequence[str | Tree] = ()
    members: Members = field(default_factory=Members)
    out: Path | None = None
    resume: bool = False
    dataset: DomainDataset | None = None
    plugins: Sequence[str | Path] = ()
    budget: Budget | None = None


def configure(request: Request) -> tuple[DomainDataset, Config]:
    """Return the data set, of which no image is read, and the configuration that `request` describes.

    Layers, later ones win: defaults, the data set's own preset unless another whole one is given (or the saved
    configuration of a run to resume), `--preset`s, flags, `--set`s.

    Raises:
        ConfigError, DataError: as in `build_config` and `open_dataset`.
    """
    load_entry_points()
    load_plugins(plugin_files(request))
    flags = option_tree(request.flags)
    own = [load_preset(given) if isinstance(given, str) else given for given in request.presets]
    assigned = [parse_assignment(given) if isinstance(given, str) else given for given in request.assignments]
    saved = _saved(request)
    dataset = request.dataset
    if dataset is None:
        source = build_config([*saved, *own, flags, *assigned]).data.source
        is_recorded = bool(saved) and source == saved[0]["data"]["source"]
        with recorded_source(source, is_recorded=is_recorded):
            dataset = open_any(source, min_domains=1)
    else:
        assigned.append({"data": {"source": f"{IN_PYTHON}{dataset.card.name}"}})
    methods_only = all(isinstance(given, str) and is_method_preset(given) for given in request.presets)
    base = saved or [dataset_layer(dataset, with_preset=methods_only)]
    given = [*own, flags, *assigned]
    if not saved and request.budget is not None:
        base += _fitted(request, request.budget, dataset, base[0], given)
    return dataset, build_config([*base, *given])


def _fitted(request: Request, budget: Budget, dataset: DomainDataset, base: Tree, layers: Sequence[Tree]) -> list[Tree]:
    """Return the layer of sizes and lengths that fit the time, or that an earlier run of this request has; or none."""
    given = merge_trees(layers)
    if not fits(budget, dataset, given):
        return []
    target = given.get("data", {}).get("target", "none")
    if target not in ("all", "none"):
        known_target(dataset, target)  # before steps are made to measure the machine
    earlier = None if request.out is None else _earlier(request.out)
    if earlier is not None and request.out is not None:
        budget.say(taken_over_text(request.out, earlier))
        return [taken_over(budget, dataset, earlier)]
    members = request.members.number
    return [choose(budget, dataset, lambda layer: build_config([base, layer, given]), given, members=members)]


def _earlier(out: Path) -> Config | None:
    """Return the configuration of what was trained in a folder before; None if nothing was."""
    planned = read_plan(out)
    return RunFolder(out).read_config() if planned is None else build_config([planned[0]])


def plugin_files(request: Request) -> list[str]:
    """Return the plug-in files that a request names: itself, or in the YAML files among its presets."""
    named = [preset_plugins(preset) for preset in request.presets if isinstance(preset, str)]
    return [*map(str, request.plugins), *(path for files in named for path in files)]


def make_plan(request: Request, progress: Progress = None) -> tuple[DomainDataset, list[Planned]]:
    """Return the data set and the runs that `request` asks for: one for each target and member.

    Raises:
        ConfigError, DataError: as in `configure`, `resolve` and `Members.check`.
    """
    request.members.check()
    dataset, config = configure(request)
    if config.data.skip_unreadable:
        dataset = without_unreadable(dataset, progress)
    targets = dataset.domains if config.data.target == "all" else (config.data.target,)
    named = load_plugins(plugin_files(request))
    plan: list[Planned] = []
    content = ""  # once for all runs: with many images it takes seconds
    for target in targets:
        configs = []
        for one in _members(config, target, request.members):
            configs.append(with_plugins(resolve(one, dataset, progress, content=content), named))
            content = configs[-1].data.content
        plan += _target_plan(request, configs, several=len(targets) > 1)
    return dataset, plan


def _members(config: Config, target: str, members: Members) -> list[Config]:
    """Return the configurations of the members for one target: they differ in seed, and in trial if that is asked."""
    configs = []
    for member in range(members.number):
        data: Tree = {"target": target}
        if members.splits == "different":
            data["trial"] = config.data.trial + member
        configs.append(
            build_config([config.model_dump(), {"data": data, "train": {"seed": config.train.seed + member}}])
        )
    return configs


def _target_plan(request: Request, configs: Sequence[Config], *, several: bool) -> list[Planned]:
    members, out = request.members, request.out
    if out is None and members.fork_at:
        # a run that begins from another's checkpoint must not take the name of the run that trained its own first steps
        out = Path("runs") / f"{config_hash(configs[0])}-fork-{members.fork_at}"
    folders = [RunFolder(_place(out, one, several=several, members=members.number)) for one in configs]
    fork_point = None
    if members.fork_at and out is not None:
        name = safe_name(configs[0].data.target)
        fork_point = ForkPoint(configs[0], RunFolder(out / f"{name}-beginning"), members.until)
    return [Planned(one, folder, fork_point) for one, folder in zip(configs, folders, strict=True)]


def with_saved_members(request: Request) -> Request:
    """Return the request with the members that its folder was planned for, if it resumes and says nothing of members.

    Raises:
        RunError: what is remembered there is damaged.
    """
    if not request.resume or request.out is None or request.members != Members():
        return request
    found = read_plan(request.out)
    return request if found is None else replace(request, members=found[1])


def _saved(request: Request) -> list[Tree]:
    """Return the configuration in the run folder that is to be resumed, so that no flag need be repeated."""
    if not request.resume or request.out is None:
        return []
    planned = read_plan(request.out)
    if planned is not None:
        return [planned[0]]
    saved = RunFolder(request.out).read_config()
    described = [*request.presets, *request.assignments, *(v for v in request.flags.values() if v is not None)]
    if saved is None and not described:
        raise ConfigError(f"--resume: there is no run in {request.out}; check --output, or give the flags to start one")
    return [] if saved is None else [saved.model_dump()]


def _place(out: Path | None, config: Config, *, several: bool, members: int) -> Path:
    if out is None:
        return Path("runs") / config_hash(config)
    if not several and members == 1:
        return out
    member = f"-seed{config.train.seed}" if members > 1 else ""
    return out / f"{safe_name(config.data.target)}{member}"


def train_runs(
    dataset: DomainDataset,
    plan: Sequence[Planned],
    callbacks: RunCallbacks | None = None,
    *,
    resume: bool = False,
    loggers: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Make every planned run, one after another, and return their results with `folder`, `method` and length.

    Args:
        dataset: of `make_plan`.
        plan: of `make_plan`.
        callbacks: how a run reports.
        resume: go on with unfinished runs.
        loggers: names of `training.loggers.LOGGERS`.

    Raises:
        Interrupted: a signal asked to stop; everything so far is kept.
        ConfigError, DataError, ModelError, RunError: as in `training.run.run`.
    """
    callbacks, results = callbacks or RunCallbacks(), []
    for number, planned in enumerate(plan, start=1):
        config, folder, fork_point = planned.config, planned.folder, planned.fork_point
        if isinstance(callbacks.callback, TrainingBar) and folder.read_result() is None:
            _introduce(callbacks.callback, config, dataset, number, plan, callbacks.warn)
        start = None
        if fork_point is not None and folder.read_result() is None:
            start = fork_point.checkpoint(config, dataset, callbacks)
        teacher = None
        if config.objective.teacher:
            from qtdog.ensemble.teacher import load_teacher

            teacher = load_teacher(config, dataset)
        logged = replace(callbacks, callback=with_loggers(loggers, folder.path, callbacks.callback))
        result = run(config, dataset, folder, resume=resume, callbacks=logged, fork_from=start, teacher=teacher)
        if fork_point is not None:
            fork_point.check(result, folder)
        about = {"method": method_name(config.model_dump()), "folder": str(folder.path)}
        results.append(result | about | {"training_steps": config.train.steps})
    return results


def _introduce(
    bar: TrainingBar,
    config: Config,
    dataset: DomainDataset,
    number: int,
    plan: Sequence[Planned],
    warn: Callable[[str], None],
) -> None:
    """Let the bar say what the run will do, which one of several it is, and that it would take days if it would."""
    from qtdog.api.budget import describe_run, slow_warning

    left = len(plan) - number
    bar.which = f"seed {config.train.seed}, {number} of {len(plan)}" if len(plan) > 1 else ""
    bar.n_after = left
    text = describe_run(config, dataset)
    if text != bar.about:  # several runs that differ in seed or target: once
        bar.about = text
        bar.say(text)
        warning = slow_warning(config, dataset, left + 1)
        if warning:
            warn(warning)


def join_targets(
    dataset: DomainDataset, plan: Sequence[Planned], out: Path | None, callbacks: RunCallbacks | None = None
) -> list[dict[str, Any]]:
    """Make the ensemble of each target from its finished members and return their results.

    Raises:
        ConfigError, RunError: as in `ensemble.assemble.assemble`.
    """
    callbacks = callbacks or RunCallbacks()
    folders: dict[str, list[Path]] = {}
    for planned in plan:
        folders.setdefault(planned.config.data.target, []).append(planned.folder.path)
    return [join_members(dataset, members, out, callbacks.progress) for members in folders.values()]


def keep_request(out: Path, plan: Sequence[Planned], members: Members) -> None:
    """Write down what was asked for, as one configuration: the first run's, for all targets if there are several."""
    first = plan[0].config
    target = "all" if len({planned.config.data.target for planned in plan}) > 1 else first.data.target
    data = first.data.model_copy(update={"target": target})
    keep_plan(out, first.model_copy(update={"data": data}), members)


def result_table(
    results: Sequence[dict[str, Any]], ensembles: Sequence[dict[str, Any]] = ()
) -> tuple[list[str], list[list[str]]]:
    """Return the table of runs of one method: a row for them, and with ensembles one for these, with their cost."""
    method = results[0]["method"]
    if not ensembles:
        return target_table({method: results})
    members = len(ensembles[0]["members"])
    return cost_table({f"{method}: mean of {members}": results, ensembles[0]["method"]: ensembles})


def keep_table(out: Path, results: Sequence[dict[str, Any]], ensembles: Sequence[dict[str, Any]] = ()) -> None:
    """Write `results.json` and `results.md` beside the folders of several runs."""
    write_atomic(out / "results.json", json.dumps(list(results), indent=1))
    write_atomic(out / "results.md", markdown(*result_table(results, ensembles)) + "\n")
