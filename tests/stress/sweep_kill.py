"""Kill workers and driver of a sweep at random moments, start it again until it is done, and compare every number.

    python tests/stress/sweep_kill.py --runs 40 --kills 20

A stress test: a command of its own, which pytest does not collect.

The sweep is one of short runs on the embedded digits with shared float steps. A kill is SIGKILL to a worker (two in
three), to the fork server, or to the driver, at a moment when workers run. Afterwards each run must be
in the index exactly once, with the file and the accuracies of an undisturbed sweep. Prints a report as JSON; the exit
code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

SET = {"data.image_size": 8, "data.batch_size": 2, "train.eval_every": 40, "train.checkpoint_every": 10}
METHODS = {"float": {"presets": ["float"]}, "lsq": {"presets": ["lsq"]}}


def write_study(path: Path, *, runs: int, steps: int) -> None:
    """Write the study file of about so many runs: two methods, two targets, seeds."""
    last = max(0, -(-runs // 4) - 1)
    base = {"presets": ["digits"], "set": SET | {"train.steps": steps}}
    grid = {"seed": f"0..{last}", "target": ["0", "75"]}
    study = {"name": path.stem, "base": base, "methods": METHODS, "grid": grid, "share_prefix": True}
    path.write_text(yaml.safe_dump(study, sort_keys=False))


def start(study: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    """Start the sweep, or go on with it."""
    command = [sys.executable, "-m", "qtdog", "sweep", str(study), "--out", str(out), "--workers", str(workers)]
    return subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def victims(driver: subprocess.Popen[bytes]) -> dict[str, list[psutil.Process]]:
    """Return the processes of a sweep by role."""
    try:
        servers = [child for child in psutil.Process(driver.pid).children() if child.children()]
        workers = [worker for server in servers for worker in server.children()]
    except psutil.NoSuchProcess:
        return {}
    return {"driver": [psutil.Process(driver.pid)], "server": servers, "worker": workers}


def kill_one(driver: subprocess.Popen[bytes], rng: random.Random) -> str | None:
    """Kill one process of a sweep and return its role; None if no worker runs."""
    role = rng.choice(["worker", "worker", "worker", "worker", "server", "driver"])
    found = victims(driver)
    if not found.get("worker"):
        return None
    try:
        os.kill(rng.choice(found[role]).pid, signal.SIGKILL)
    except ProcessLookupError:
        return None
    return role


def disturbed(study: Path, out: Path, *, workers: int, kills: int, rng: random.Random) -> dict[str, int]:
    """Run the sweep to its end, with so many kills on the way; return how many of each role."""
    done = {"worker": 0, "server": 0, "driver": 0}
    driver = start(study, out, workers)
    while True:
        try:
            driver.wait(timeout=rng.uniform(0.5, 4.0) if sum(done.values()) < kills else None)
        except subprocess.TimeoutExpired:
            role = kill_one(driver, rng)
            if role is not None:
                done[role] += 1
            continue
        if driver.returncode == 0:
            return done
        if driver.returncode != -signal.SIGKILL:
            assert driver.stderr is not None
            raise SystemExit(f"the sweep failed:\n{driver.stderr.read().decode()}")
        driver = start(study, out, workers)


def rows(out: Path) -> list[dict[str, Any]]:
    """Return what the index says of every run, without what time and place decide."""
    command = [sys.executable, "-m", "qtdog", "runs", "kind = 'run'", "--out", str(out), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    for row in found:
        row["model_sha256"] = json.loads((out / row["folder"] / "result.json").read_text())["model_sha256"]
        del row["trained_s"], row["study"]
    return found


def main() -> None:
    """Run the comparison and print what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        root, study = Path(name), Path(name) / "study.yaml"
        write_study(study, runs=options.runs, steps=options.steps)
        started = time.perf_counter()
        whole = start(study, root / "whole", options.workers)
        _, errors = whole.communicate()
        if whole.returncode:
            raise SystemExit(f"the undisturbed sweep failed:\n{errors.decode()}")
        undisturbed_s = time.perf_counter() - started
        started = time.perf_counter()
        kills = disturbed(study, root / "killed", workers=options.workers, kills=options.kills, rng=rng)
        killed_s = time.perf_counter() - started
        expected, found = rows(root / "whole"), rows(root / "killed")
    once = len({row["folder"] for row in found}) == len(found)
    report = {"runs": len(found), "each_once": once, "identical": found == expected, "kills": kills}
    print(json.dumps(report | {"undisturbed_s": round(undisturbed_s), "killed_s": round(killed_s)}))
    sys.exit(0 if once and found == expected else 1)


if __name__ == "__main__":
    main()
