"""What the machine offers to this process."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath


def n_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: its affinity, or less if a container limits its share of time.

    Args:
        root: of the file system in which the limits are read (/proc and /sys).
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return found if math.isinf(quota) else max(1, min(found, math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return how many cores' time the control groups (version 1 or 2) of this process leave it; infinite if all.

    A group may use no more than any group that it lies in. In a container the path of the group may name folders that
    are not there: then the nearest one that is.

    Args:
        root: of the file system in which the limits are read.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    limits = [math.inf]
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            limits += _limits(root / "sys/fs/cgroup", path, _quota_2)
        elif "cpu" in controllers.split(","):
            for name in ("cpu", "cpu,cpuacct", controllers):
                limits += _limits(root / "sys/fs/cgroup" / name, path, _quota_1)
    return min(limits)


def _limits(top: Path, path: str, read: Callable[[Path], float]) -> list[float]:
    inside = PurePosixPath(path.lstrip("/"))
    return [read(top / part) for part in (inside, *inside.parents)]


def _quota_2(group: Path) -> float:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _quota_1(group: Path) -> float:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        return quota / int((group / "cpu.cfs_period_us").read_text()) if quota > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
