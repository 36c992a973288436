"""Whether training, export and tables still give the bytes that they gave: a command, since bits differ by processor.

    git worktree add /tmp/before COMMIT
    PYTHONPATH=/tmp/before/src python tests/golden/model_files.py --write /tmp/before.json
    python tests/golden/model_files.py --compare /tmp/before.json

Six short runs on the embedded digits (float; LSQ; LSQ + SMA; INQ; CORAL + SAM + SWAD; three forked members and their
ensemble), one ONNX and one INT8 export, and a table. One thread; about 90 seconds of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qtdog.core.files import sha256_file

BASE = ["train", "--data", "rotated-digits", "--target", "0", "--steps", "60", "--set", "train.eval_every=10"]
LSQ = ["--start-step", "20", "--quantizer", "lsq"]
RUNS = {
    "float": [],
    "lsq": [*LSQ, "--bits", "4"],
    "lsq+sma": [*LSQ, "--averager", "sma"],
    "inq": ["--start-step", "20", "--quantizer", "inq"],
    "coral+sam+swad": ["--objective", "coral", "--step-rule", "sam", "--averager", "swad", "--set",
                       "averager.params={n_converge: 1, n_tolerance: 2, tolerance: 1.0}"],
    "forked": [*LSQ, "--members", "3", "--fork-at", "start"],
}  # fmt: skip
EXPORTS = {"onnx": [], "onnx-int8": ["--data", "rotated-digits"]}


def qtdog(folder: Path, *arguments: object) -> str:
    """Run one command in `folder` and return what it prints.

    Raises:
        CalledProcessError: the command failed; its errors are on the terminal.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "qtdog", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def golden_values(folder: Path) -> dict[str, str]:
    """Return the sha256 of each model file and export, and the table, by name."""
    values = {}
    runs = folder / "runs"
    for name, extra in RUNS.items():
        qtdog(folder, *BASE, *extra, "--out", runs / name)
        for file in sorted((runs / name).rglob("model.safetensors")):
            values[f"run/{file.relative_to(runs)}"] = sha256_file(file)
    for kind, extra in EXPORTS.items():
        exported = folder / f"{kind}.onnx"
        qtdog(folder, "export", runs / "lsq/model.safetensors", "-o", exported, "--format", kind, *extra)
        values[f"export/{kind}"] = sha256_file(exported)
    values["table"] = qtdog(folder, "table", *(runs / name for name in RUNS if name != "forked"), "--format", "csv")
    return values


def main() -> int:
    """Write the values, or compare them with those that were written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE", help="file that the values are written to")
    what.add_argument("--compare", type=Path, metavar="FILE", help="file of earlier values")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        values = golden_values(Path(folder))
    if options.write:
        options.write.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
        return 0
    known = json.loads(options.compare.read_text())
    changed = [name for name in known if values.get(name) != known[name]]
    for name in changed:
        print(f"changed: {name}\n  was {known[name]}\n  is  {values.get(name)}")
    print(f"{len(known) - len(changed)} of {len(known)} golden values hold")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
