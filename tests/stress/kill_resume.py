"""Kill a run with SIGKILL at random moments, resume it each time, and compare the final file with an undisturbed one.

    python tests/stress/kill_resume.py --kills 20

The run is a short one on the embedded digits with a checkpoint every 10 steps. Moments are uniform between shortly
before the run folder is first written and a few seconds later; when a run ends before its kill, a new one begins. The
exit code is 1 if any final file differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGS = ["--target", "75", "--batch-size", "8", "--image-size", "12", "--set", "train.eval_every=20"]


def start(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    """Start (or resume) the run in `folder`."""
    every = ["--set", "train.checkpoint_every=10", "--steps", str(steps)]
    command = [sys.executable, "-m", "qtdog", "train", *FLAGS, *every, "--out", str(folder), "--resume"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], folder: Path) -> str:
    """Wait for a run and return the hash of its model file."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed:\n{errors.decode()}")
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def first_write_s(process: subprocess.Popen[bytes], folder: Path) -> float:
    """Return the seconds until the run's metrics file appears."""
    started = time.perf_counter()
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    return time.perf_counter() - started


def kill_and_resume(folder: Path, *, steps: int, kills: int, delays: tuple[float, float], rng: random.Random) -> int:
    """Start the run again and again, killing it each time, until it ends or `kills` are used up; return the kills."""
    for used in range(kills):
        process = start(folder, steps)
        try:
            process.wait(timeout=rng.uniform(*delays))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            continue
        finish(process, folder)
        return used
    return kills


def main() -> None:
    """Run the comparison and print what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "undisturbed"
        process = start(whole, options.steps)
        start_s = first_write_s(process, whole)
        expected = finish(process, whole)
        delays = (0.7 * start_s, start_s + 3.0)
        done, hashes = 0, []
        while done < options.kills:
            folder = Path(name) / f"killed-{len(hashes)}"
            done += kill_and_resume(folder, steps=options.steps, kills=options.kills - done, delays=delays, rng=rng)
            hashes.append(finish(start(folder, options.steps), folder))
    same = [digest == expected for digest in hashes]
    print(json.dumps({"kills": done, "runs": len(same), "identical": sum(same), "sha256": expected}))
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
