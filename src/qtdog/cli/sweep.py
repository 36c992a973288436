"""`qtdog sweep`: run a study, ask for its status, retry, table, merge."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtdog.cli.options import (
    Address,
    DataFolder,
    EngineChoice,
    EngineName,
    Gpus,
    Hours,
    JsonOutput,
    Log,
    Only,
    OutFolder,
    Partition,
    QtdogGroup,
    RunsFolder,
    StudyFile,
    Threads,
    Workers,
)
from qtdog.cli.sweep_output import table
from qtdog.core.errors import ConfigError

if TYPE_CHECKING:
    from qtdog.sweep.clusters import SlurmJob
    from qtdog.sweep.estimate import Throughput
    from qtdog.sweep.local import Resources
    from qtdog.sweep.plan import Plan, Task
    from qtdog.sweep.runner import Engine, SweepProgress


def open_plan(study: Path, data: str | None, out: Path | None) -> tuple[Plan, Path]:
    """Return the plan of a study file and the folder of its runs.

    Raises:
        ConfigError, DataError: as in `sweep.study.read_study` and `sweep.plan.make_plan`.
    """
    from qtdog.cli.console import CountingBar
    from qtdog.sweep.plan import default_out, make_plan
    from qtdog.sweep.study import read_study

    found = read_study(study)
    plan = make_plan(found, data, CountingBar("reading images"))
    return plan, out or default_out(found)


@dataclass(frozen=True)
class EngineOptions:
    """The engine that runs the tasks, and what it gets.

    Attributes:
        engine: local, ray or slurm.
        workers: runs at a time; None for one per GPU or core, with ray for as many as there is room for.
        threads: of each; None for one, or with GPUs for all cores shared out.
        gpus: of each; None for one where there are any, with ray and slurm for none.
        address: of a Ray cluster.
        partition: of Slurm.
        hours: of each Slurm job.
        loggers: names of the loggers that the runs' numbers are sent to.
    """

    engine: str = "local"
    workers: int | None = None
    threads: int | None = None
    gpus: float | None = None
    address: str | None = None
    partition: str = ""
    hours: float = 4.0
    loggers: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse flags that the engine would not read.

        Raises:
            ConfigError: naming the flag.
        """
        from qtdog.training.loggers import with_loggers

        readers = {"--address": ("ray",), "--partition": ("slurm",)}
        given = {"--address": self.address, "--partition": self.partition}
        with_loggers(self.loggers, Path())
        if self.loggers and self.engine != "local":
            raise ConfigError("--log is for --engine local; on a cluster look at the run folders")
        for flag, engines in readers.items():
            if given[flag] and self.engine not in engines:
                raise ConfigError(f"{flag} is for --engine {' or '.join(engines)}; leave it out for {self.engine}")

    def for_loggers(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks; with a logger each run makes its own updates."""
        from qtdog.sweep.plan import keep_sharing

        return [one for task in tasks for one in keep_sharing([task])] if self.loggers else list(tasks)

    @property
    def resources(self) -> Resources:
        """How the runs share this machine; of a cluster, what the estimate assumes.

        Raises:
            ConfigError: with the local engine, GPUs that this machine does not have.
        """
        from qtdog.sweep.local import local_resources

        gpus = self.gpus if self.engine == "local" else 0  # a login node need not have those of the cluster
        return local_resources(workers=self.workers, threads=self.threads, gpus=gpus)


def make_engine(options: EngineOptions, plan: Plan, folder: Path) -> Engine:
    """Return the engine, ready to start tasks.

    Raises:
        ConfigError, RunError: what it needs is not installed or not there.
    """
    from qtdog.sweep.clusters import RayEngine, SlurmEngine
    from qtdog.sweep.local import LocalEngine, local_resources

    if options.engine == "ray":
        here = local_resources(workers=options.workers, threads=options.threads, gpus=0)
        workers = options.workers if options.address else here.workers
        threads = (options.threads or 1) if options.address else here.threads
        ray_options = {
            "workers": workers,
            "threads": threads,
            "gpus": options.gpus or 0.0,
            "address": options.address,
        }
        return RayEngine(folder, plan.source, **ray_options)
    if options.engine == "slurm":
        return SlurmEngine(folder, plan.source, workers=options.workers or 64, job=_job(options))
    return LocalEngine(folder, plan.source, options.resources, loggers=options.loggers)


def show_job(options: EngineOptions) -> None:
    """Print what each job of a dry run with Slurm asks for; nothing for other engines."""
    if options.engine == "slurm":
        from qtdog.cli.console import out

        asked = ", ".join(f"{name}={value}" for name, value in _job(options).parameters.items())
        out.print(f"Each run is a Slurm job with {asked}", highlight=False, markup=False, soft_wrap=True)


def _job(options: EngineOptions) -> SlurmJob:
    from qtdog.sweep.clusters import SlurmJob

    return SlurmJob(options.threads or 1, int(options.gpus or 0), options.hours, options.partition)


def dry_run(plan: Plan, tasks: Sequence[Task], folder: Path, *, resources: Resources) -> None:
    """Show what is missing of some tasks, and estimate its time; nothing is started.

    Step times are those of the folder's finished runs; where there are none, a few steps are made here and now.

    Raises:
        ConfigError: as in `sweep.runner.check_tasks`.
    """
    from qtdog.cli.console import CountingBar, out, print_table
    from qtdog.sweep.estimate import Throughput
    from qtdog.sweep.runner import check_tasks, unfinished

    missing = unfinished(tasks, folder)
    check_tasks(missing, plan.dataset, CountingBar("decoding images"))
    kinds = {kind: sum(task.kind == kind for task in missing) for kind in ("fork_point", "run", "ensemble")}
    named = f"{kinds['run']} runs, {kinds['fork_point']} shared fork points, {kinds['ensemble']} ensembles"
    out.print(f"{len(tasks) - len(missing)} of {len(tasks)} done; missing: {named}", highlight=False)
    throughput = Throughput(plan.tasks, folder)
    step_s = step_times(plan, tasks, throughput, resources.threads)
    rows = _rows(missing, step_s, throughput.overhead, resources.workers)
    workers = "1 worker" if resources.workers == 1 else f"{resources.workers} workers"
    title = f"what is missing, on {workers} like those of this machine"
    print_table(["what", "estimate"], rows, title=title)
    source = f"{throughput.n} finished runs" if throughput.n else "a few steps made just now"
    out.print(f"Step times: {source}; overhead of evaluations and start: {throughput.overhead:.2f}.", highlight=False)
    for line in _compared_with_journal(plan, folder, step_s, throughput.overhead):
        out.print(line, highlight=False)
    if plan.study.share_prefix or plan.study.share_averaged:
        alone = sum(task.config.train.steps for task in tasks if task.kind == "run" and task.config is not None)
        steps = sum(task.steps for task in tasks)
        out.print(f"Sharing: {steps:,} steps in all instead of {alone:,}.", highlight=False)


def step_times(plan: Plan, tasks: Sequence[Task], throughput: Throughput, threads: int) -> dict[str, float]:
    """Return seconds per step by task name, probing what no finished run tells."""
    from qtdog.sweep.estimate import cost_class
    from qtdog.training.step_time import probe

    probed: dict[tuple[object, ...], float] = {}
    found = {}
    for task in tasks:
        if task.config is None:
            continue
        known = throughput.step_s(task.config)
        if known is None:
            key = cost_class(task.config)
            if key not in probed:
                probed[key] = probe(task.config, plan.dataset, threads=threads)
            known = probed[key]
        found[task.name] = known
    return found


def _rows(missing: Sequence[Task], step_s: dict[str, float], overhead: float, workers: int) -> list[list[str]]:
    from qtdog.api.display import duration_text
    from qtdog.sweep.estimate import simulate, task_seconds

    found = simulate(missing, workers, lambda task: task_seconds(task, step_s, overhead=overhead))
    idle = max(0.0, 1 - found.busy_s / (found.wall_s * workers)) if found.wall_s else 0.0
    return [
        ["wall time", duration_text(found.wall_s)],
        ["time of all workers", duration_text(found.busy_s)],
        ["longest chain of runs", duration_text(found.critical_s)],
        ["workers idle", f"{idle:.0%}"],
    ]


def _compared_with_journal(plan: Plan, folder: Path, step_s: dict[str, float], overhead: float) -> list[str]:
    """Return a line that compares the same estimate with the time that the finished tasks of this folder took."""
    from qtdog.api.display import duration_text
    from qtdog.sweep.estimate import task_seconds
    from qtdog.sweep.journal import read_journal

    journal = read_journal(folder)
    known = [task for task in plan.tasks if task.name in journal and task.name in step_s]
    if not known:
        return []
    actual = sum(journal[task.name]["seconds"] for task in known)
    guessed = sum(task_seconds(task, step_s, overhead=overhead) for task in known)
    return [f"Checked on {len(known)} finished: estimated {duration_text(guessed)}, took {duration_text(actual)}."]


FRESH = "Delete what the failed runs wrote first, instead of going on from their last checkpoint. Finished runs stay."


def status(
    study: StudyFile,
    *,
    out: RunsFolder = None,
    data: DataFolder = None,
    every: Annotated[bool, typer.Option("--all", help="Show a line for each run.")] = False,
    as_json: JsonOutput = False,
) -> None:
    """Show what is done, running, failed (and why) and missing, and what finished runs warned of. Nothing is changed.

    Example:
      qtdog sweep status studies/digits.yaml
    """
    from qtdog.cli.console import print_json
    from qtdog.cli.sweep_output import failure_lines, warning_lines
    from qtdog.sweep.journal import read_failures, read_warnings
    from qtdog.sweep.runner import task_states

    plan, folder = open_plan(study, data, out)
    found = task_states(plan.tasks, folder)
    failures = {name: why for name, why in read_failures(folder).items() if found.get(name) == "failed"}
    warnings = {name: texts for name, texts in read_warnings(folder).items() if found.get(name) == "done"}
    if as_json:
        tasks = [
            {"folder": task.name, "kind": task.kind, "labels": list(task.labels), "state": found[task.name]}
            | ({"reason": failures[task.name].reason} if task.name in failures else {})
            | ({"warnings": warnings[task.name]} if task.name in warnings else {})
            for task in plan.tasks
        ]
        print_json({"out": str(folder), "counts": Counter(found.values()), "tasks": tasks})
        return
    lines = [*failure_lines(plan.tasks, failures, []), *warning_lines(plan.tasks, warnings)]
    _show_status(plan.tasks, found, lines, folder, every=every)


def _show_status(
    tasks: Sequence[Task], found: dict[str, str], lines: Sequence[str], folder: Path, *, every: bool
) -> None:
    from qtdog.api.display import duration_text
    from qtdog.cli.console import out, print_table
    from qtdog.sweep.estimate import Throughput
    from qtdog.sweep.runner import STATES, unfinished

    if every:
        print_table(["run", "state", "folder"], [[task.text, found[task.name], task.name] for task in tasks])
    counts: dict[str, Counter[str]] = {}
    for task in tasks:
        name = str(task.labels[0]["method"]) if task.labels else "fork points"
        counts.setdefault(name, Counter())[found[task.name]] += 1
    rows = [[name, *(str(count[state] or "") for state in STATES)] for name, count in counts.items()]
    total = Counter(found[task.name] for task in tasks)
    print_table(["method", *STATES], [*rows, ["all", *(str(total[state] or "") for state in STATES)]])
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    left = Throughput(tasks, folder).left_s(unfinished(tasks, folder), [])
    if left:
        out.print(f"About {duration_text(left)} of one worker left, by the runs that are done.", highlight=False)


def read_engine_options(
    *,
    log: Log = None,
    engine: EngineChoice = EngineName.LOCAL,
    workers: Workers = None,
    threads: Threads = None,
    gpus: Gpus = None,
    address: Address = None,
    partition: Partition = "",
    hours: Hours = 4.0,
) -> EngineOptions:
    """Return the engine that the command line asks for.

    Raises:
        ConfigError: a flag that the engine would not read.
    """
    options = EngineOptions(engine.value, workers, threads, gpus, address, partition, hours, tuple(log or ()))
    options.check()
    return options


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the flags of `read_engine_options` in the place of its argument `options`."""
    parts = [inspect.signature(function, eval_str=True).parameters for function in (command, read_engine_options)]
    own, flags = (list(part.values()) for part in parts)

    def run(**values: Any) -> None:
        options = read_engine_options(**{flag.name: values.pop(flag.name) for flag in flags})
        command(**values, options=options)

    parameters = [*(parameter for parameter in own if parameter.name != "options"), *flags]
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(run)["__signature__"] = inspect.Signature(parameters)
    return run


@with_engine_options
def retry(
    study: StudyFile,
    *,
    out: OutFolder = None,
    data: DataFolder = None,
    only: Only = None,
    fresh: Annotated[bool, typer.Option("--fresh", help=FRESH)] = False,
    options: EngineOptions,
) -> None:
    """Try only the failed runs again (`qtdog sweep STUDY` does so too, and makes the missing ones).

    Example:
      qtdog sweep retry studies/digits.yaml --fresh
    """
    from qtdog.cli.console import out as console
    from qtdog.sweep.journal import read_failures
    from qtdog.sweep.plan import select_tasks, with_needs
    from qtdog.sweep.runner import discard_unfinished

    plan, folder = open_plan(study, data, out)
    failed = set(read_failures(folder))
    tasks = [task for task in (select_tasks(plan.tasks, only) if only else plan.tasks) if task.name in failed]
    if not tasks:
        console.print("nothing failed")
        return
    if fresh:
        for task in discard_unfinished(tasks, folder):
            console.print(f"{task.name} is finished or in use, and is kept", highlight=False, markup=False)
    wanted = options.for_loggers(with_needs(plan.tasks, tasks))
    sweep_tasks(plan, wanted, folder, lambda: make_engine(options, plan, folder))


def merge(
    sources: Annotated[list[Path], typer.Argument(help="Folders of run folders, from other machines.", metavar="FROM")],
    *,
    into: Annotated[Path, typer.Option("--output", "-o", help="Folder that they are copied to.")],
) -> None:
    """Copy the runs that are missing in a folder, or came farther elsewhere. The sources are not changed.

    Example:
      qtdog sweep merge /mnt/other/runs/digits -o runs/digits
    """
    from qtdog.cli.console import out, warn
    from qtdog.core.errors import RunError
    from qtdog.sweep.journal import merge_folders as merge_runs

    found = merge_runs(sources, into)
    counts = f"{len(found.copied)} copied, {len(found.kept)} were there, {len(found.busy)} in use and left alone"
    out.print(counts, highlight=False)
    if found.damaged:
        listed = ", ".join(found.damaged[:10])
        warn(f"{len(found.damaged)} folders hold a link or a device, which no run writes, and were left out: {listed}")
    if found.conflicts:
        listed = ", ".join(found.conflicts[:10])
        raise RunError(
            f"{len(found.conflicts)} runs are finished in both places with different files; those in {into} stayed: "
            f"{listed}. Runs on other processors or versions of PyTorch may differ in the last bits"
        )


LIMIT = "Start at most this number of runs, then stop. Default: all."
DRY = "Check the study, show what is missing and how long it would take; start nothing."


@with_engine_options
def sweep(
    study: StudyFile,
    *,
    out: OutFolder = None,
    data: DataFolder = None,
    only: Only = None,
    limit: Annotated[int | None, typer.Option(min=1, help=LIMIT)] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help=DRY)] = False,
    options: EngineOptions,
) -> None:
    """Make all runs of a study that are missing; stopped or killed, the same command goes on.

    Examples:
      qtdog sweep studies/digits.yaml

      qtdog sweep studies/pacs.yaml --data data/pacs --workers 2 --only "lsq target=sketch"

      qtdog sweep studies/pacs.yaml --data data/pacs --dry-run --workers 64

      qtdog sweep status studies/digits.yaml
    """
    from qtdog.sweep.plan import select_tasks

    plan, folder = open_plan(study, data, out)
    tasks = options.for_loggers(select_tasks(plan.tasks, only) if only else plan.tasks)
    if dry:
        dry_run(plan, tasks, folder, resources=options.resources)
        show_job(options)
        return
    say_idle_cores(options)
    sweep_tasks(plan, tasks, folder, lambda: make_engine(options, plan, folder), limit=limit)


def say_idle_cores(options: EngineOptions) -> None:
    """Say that threads would use more of this machine, where runs on processors leave half of it idle or more."""
    from qtdog.cli.console import err
    from qtdog.core.machine import n_cores

    if options.engine != "local" or options.threads is not None:
        return
    resources = options.resources
    each = n_cores() // resources.workers
    if not resources.gpus and each > 1:
        text = f"{resources.workers} run(s) at a time with 1 thread each, on {n_cores()} cores"
        err.print(f"{text}: --threads {each} is faster. The last bits of a run depend on it, so keep to one number")


def sweep_tasks(
    plan: Plan, tasks: Sequence[Task], folder: Path, engine: Callable[[], Engine], *, limit: int | None = None
) -> None:
    """Do what is missing of some tasks, show how it goes, and say how it ended.

    Raises:
        ConfigError: a mistake in what is to be done; nothing was started.
        Interrupted, RunError: as in `sweep.runner.Driver.run`, or something failed.
    """
    from qtdog.cli.console import out
    from qtdog.sweep.runner import unfinished

    progress = drive(plan, tasks, folder, engine, limit=limit)
    left = len(unfinished(plan.tasks, folder))
    out.print(f"{len(plan.tasks) - left} of {len(plan.tasks)} done in {folder}", highlight=False, markup=False)
    raise_failed(plan, progress)


def drive(
    plan: Plan, tasks: Sequence[Task], folder: Path, engine: Callable[[], Engine], *, limit: int | None = None
) -> SweepProgress:
    """Do what is missing of some tasks and show how it goes (errors as in `sweep_tasks`, but for failed tasks)."""
    from qtdog.cli.console import CountingBar
    from qtdog.cli.sweep_output import progress_display
    from qtdog.cli.train import warn_skipped
    from qtdog.sweep.journal import save_labels
    from qtdog.sweep.runner import Driver, check_tasks, unfinished

    warn_skipped(plan.dataset)
    check_tasks(unfinished(tasks, folder), plan.dataset, CountingBar("decoding images"))
    save_labels(plan.study.name, plan.labels, folder)
    with progress_display(folder) as display:
        return Driver(tasks, folder, engine(), display, limit=limit).run()


def raise_failed(plan: Plan, progress: SweepProgress) -> None:
    """Leave with an error that lists the failed tasks and those that wait for them, if any failed."""
    from qtdog.cli.sweep_output import failure_lines
    from qtdog.core.errors import RunError

    if progress.failed:
        lines = failure_lines(plan.tasks, progress.failed, progress.blocked())
        raise RunError("\n".join([f"{len(progress.failed)} failed; the same command tries them again:", *lines]))


DEFAULT = "run"
STUDY_SUFFIXES = (".yaml", ".yml")


def _is_study(word: str) -> bool:
    return word.startswith("-") or "/" in word or word.endswith(STUDY_SUFFIXES) or Path(word).exists()


class SweepGroup(QtdogGroup):
    """Reads `qtdog sweep STUDY …` as `qtdog sweep run STUDY …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command before arguments that name none."""
        # a word that looks like neither a study nor an option is a mistyped command: the group names the nearest
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h") and _is_study(args[0]):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


sweep_app = typer.Typer(
    cls=SweepGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make all runs of a study, and go on where they stopped: qtdog sweep STUDY.yaml.",
)
sweep_app.command(name=DEFAULT)(sweep)
for _command in (status, retry, table, merge):
    sweep_app.command()(_command)
