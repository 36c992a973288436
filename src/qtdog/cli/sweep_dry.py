"""`qtdog sweep --dry-run`: what would be done, how long it would take, and what it would cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtdog.sweep.estimate import Cluster, Pace
    from qtdog.sweep.local import Crew
    from qtdog.sweep.plan import Plan, Task


def dry_run(plan: Plan, tasks: Sequence[Task], folder: Path, *, cluster: str | None, crew: Crew) -> None:
    """Say what is missing of some tasks, and estimate its time here or on a cluster; nothing is started.

    Step times are those of the folder's finished runs; where there are none, a few steps are made here and now.
    """
    from qtdog.cli.console import out, print_table
    from qtdog.sweep.estimate import Cluster, Pace, parse_cluster
    from qtdog.sweep.runner import unfinished

    where = parse_cluster(cluster) if cluster else Cluster(crew.workers, "core")
    missing = unfinished(tasks, folder)
    kinds = {kind: sum(task.kind == kind for task in missing) for kind in ("prefix", "run", "ensemble")}
    named = f"{kinds['run']} runs, {kinds['prefix']} shared beginnings, {kinds['ensemble']} ensembles"
    out.print(f"{len(tasks) - len(missing)} of {len(tasks)} done; missing: {named}", highlight=False)
    pace = Pace(plan.tasks, folder)
    step_s = step_times(plan, tasks, pace, crew.threads)
    rows = _rows(missing, step_s, pace.overhead, where)
    place = cluster or f"{crew.workers} workers of this machine"
    print_table(["what", "estimate"], rows, title=f"what is missing, on {place}")
    source = f"{pace.n} finished runs" if pace.n else "a few steps made just now"
    out.print(f"Step times: {source}; overhead of evaluations and start: {pace.overhead:.2f}.", highlight=False)
    if cluster:
        device = where.device
        text = f"Assumed, not measured: one {where.name} is {device.speed:g} times one worker here, "
        out.print(f"{text}at ${device.usd_per_hour:g} an hour.", highlight=False)
    for line in _checked(plan, folder, step_s, pace.overhead):
        out.print(line, highlight=False)
    if plan.study.share_prefix or plan.study.share_averaged:
        alone = sum(task.config.train.steps for task in tasks if task.kind == "run" and task.config is not None)
        steps = sum(task.steps for task in tasks)
        out.print(f"Sharing: {steps:,} steps in all instead of {alone:,}.", highlight=False)


def step_times(plan: Plan, tasks: Sequence[Task], pace: Pace, threads: int) -> dict[str, float]:
    """Return seconds per step by task name, probing what no finished run tells."""
    from qtdog.sweep.estimate import cost_class, probe

    probed: dict[tuple[object, ...], float] = {}
    found = {}
    for task in tasks:
        if task.config is None:
            continue
        known = pace.step_s(task.config)
        if known is None:
            key = cost_class(task.config)
            if key not in probed:
                probed[key] = probe(task.config, plan.dataset, threads=threads)
            known = probed[key]
        found[task.name] = known
    return found


def _rows(missing: Sequence[Task], step_s: dict[str, float], overhead: float, where: Cluster) -> list[list[str]]:
    from qtdog.cli.sweep_board import time_text
    from qtdog.sweep.estimate import START_S, simulate, task_seconds

    device = where.device
    how = {"overhead": overhead, "speed": device.speed, "start_s": 0.0 if where.name == "core" else START_S}
    found = simulate(missing, where.n, lambda task: task_seconds(task, step_s, **how))
    cost = found.wall_s / 3600 * where.n * device.usd_per_hour
    idle = 1 - found.busy_s / (found.wall_s * where.n) if found.wall_s else 0.0
    return [
        ["wall time", time_text(found.wall_s)],
        ["device time", time_text(found.busy_s)],
        ["longest chain of runs", time_text(found.critical_s)],
        ["devices idle", f"{idle:.0%}"],
        ["cost (assumed prices)", f"${cost:,.2f}"],
    ]


def _checked(plan: Plan, folder: Path, step_s: dict[str, float], overhead: float) -> list[str]:
    """Return how far the same estimate is from what the finished tasks of this folder took."""
    from qtdog.cli.sweep_board import time_text
    from qtdog.sweep.estimate import task_seconds
    from qtdog.sweep.journal import read_journal

    journal = read_journal(folder)
    known = [task for task in plan.tasks if task.name in journal and task.name in step_s]
    if not known:
        return []
    actual = sum(journal[task.name]["seconds"] for task in known)
    guessed = sum(task_seconds(task, step_s, overhead=overhead) for task in known)
    return [f"Checked on {len(known)} finished: estimated {time_text(guessed)}, took {time_text(actual)}."]
