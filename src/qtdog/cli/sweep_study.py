"""From the arguments of the sweep commands to a plan."""

from __future__ import annotations

from pathlib import Path

from qtdog.cli.progress import CountingBar
from qtdog.sweep.plan import Plan, default_out, make_plan
from qtdog.sweep.study import read_study


def open_plan(study: Path, data: str | None, out: Path | None) -> tuple[Plan, Path]:
    """Return the plan of a study file and the folder of its runs.

    Raises:
        ConfigError, DataError: as in `sweep.study.read_study` and `sweep.plan.make_plan`.
    """
    found = read_study(study)
    plan = make_plan(found, data, CountingBar("reading images"))
    return plan, out or default_out(found)
