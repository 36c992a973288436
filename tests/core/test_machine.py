"""How many cores a process may use where a container limits them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from qtdog.core.machine import cpu_quota, n_cores


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(root: Path, line: str, files: dict[str, str]) -> Path:
    return write(root, **{"proc__self__cgroup": line, **{f"sys__fs__cgroup__{k}": v for k, v in files.items()}})


@pytest.mark.parametrize(
    ("line", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a__cpu.max": "150000 100000\n", "a__b__cpu.max": "max 100000\n"}, 1.5),
        ("0::/not/mounted/here\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("3:cpu,cpuacct:/x\n", {"cpu__x__cpu.cfs_quota_us": "50000", "cpu__x__cpu.cfs_period_us": "100000"}, 0.5),
        ("3:cpu:/x\n", {"cpu__x__cpu.cfs_quota_us": "-1", "cpu__x__cpu.cfs_period_us": "100000"}, math.inf),
        ("2:memory:/x\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "broken"}, math.inf),
    ],
)
def test_the_quota_of_a_control_group(tmp_path, line, files, quota):
    root = group(tmp_path, line, files)
    assert cpu_quota(root) == quota
    here = len(os.sched_getaffinity(0))
    assert n_cores(root) == (here if math.isinf(quota) else max(1, min(here, math.ceil(quota))))


def test_without_control_groups_the_affinity_counts(tmp_path):
    assert cpu_quota(tmp_path) == math.inf
    assert n_cores(tmp_path) == len(os.sched_getaffinity(0))
