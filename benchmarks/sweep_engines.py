"""The same short sweep by each engine: same results, time, overhead per run, and workers against cores.

    python benchmarks/sweep_engines.py --runs 16 --steps 200

Local with as many one-thread workers as cores, local with twice as many, and Ray on this machine. The overhead in a run
is its time outside training steps (evaluations, checkpoints, the shipped file), that of the engine all else: imports,
start of workers, waiting. Prints a report as JSON; the exit code is 1 if results differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from qtdog.sweep.journal import read_journal

SET = {"data.image_size": 12, "data.batch_size": 8, "train.eval_every": 50}
METHODS = {"float": {"presets": ["float"]}, "lsq": {"presets": ["lsq"]}}


def write_study(path: Path, *, runs: int, steps: int) -> None:
    """Write a study of about so many runs."""
    base = {"presets": ["digits"], "set": SET | {"train.steps": steps}}
    grid = {"seed": f"0..{max(0, -(-runs // 4) - 1)}", "target": ["0", "75"]}
    study = {"name": "engines", "base": base, "methods": METHODS, "grid": grid}
    path.write_text(yaml.safe_dump(study, sort_keys=False))


def files(out: Path) -> dict[str, str]:
    """Return the hash of each run's model file."""
    return {file.parent.name: json.loads(file.read_text())["model_sha256"] for file in out.glob("*/result.json")}


def measure(study: Path, out: Path, flags: list[str], workers: int) -> dict[str, Any]:
    """Run the sweep and return what it took."""
    command = [sys.executable, "-m", "qtdog", "sweep", str(study), "--out", str(out), "--workers", str(workers)]
    started = time.perf_counter()
    done = subprocess.run([*command, "--threads", "1", *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the sweep failed:\n{done.stderr}")
    wall_s = time.perf_counter() - started
    journal = read_journal(out).values()
    trained_s = sum(line["trained_s"] for line in journal)
    in_tasks_s = sum(line["seconds"] for line in journal)
    return {
        "workers": workers,
        "wall_s": round(wall_s, 1),
        "runs": len(journal),
        "overhead_in_run_s": round((in_tasks_s - trained_s) / len(journal), 2),
        "overhead_of_engine_s": round(max(0.0, wall_s - in_tasks_s / workers), 2),
    }


def main() -> None:
    """Run all and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--without-ray", action="store_true")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    cases = {"local": ([], cores), "local, twice the workers": ([], 2 * cores)}
    if not options.without_ray:
        cases["ray"] = (["--engine", "ray"], cores)
    report, found, load = {}, [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        study = Path(name) / "engines.yaml"
        write_study(study, runs=options.runs, steps=options.steps)
        for case, (flags, workers) in cases.items():
            out = Path(name) / case.replace(" ", "-")
            report[case] = measure(study, out, flags, workers)
            found.append(files(out))
            print(f"{case}: {report[case]}", file=sys.stderr, flush=True)
    same = all(one == found[0] for one in found)
    print(json.dumps({"cores": cores, "identical": same, "load_before": round(load, 2), "engines": report}))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
