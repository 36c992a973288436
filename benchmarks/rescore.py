"""Load every model file of a sweep again and score it on its unseen domain: it must give just what its run recorded.

    python benchmarks/rescore.py RUNS --data DATA

RUNS is a folder of run folders. Prints a line per file; the exit code is 1 if one differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qtdog.data.dataset import DomainSubset, require_images
from qtdog.data.open import open_dataset
from qtdog.ensemble.scoring import score_domains
from qtdog.runs.find import run_folders
from qtdog.runs.folder import RunFolder
from qtdog.training.load_model import load_model


def main() -> None:
    """Score every finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--data", default="rotated-digits")
    options = parser.parse_args()
    dataset = require_images(open_dataset(options.data))
    n_wrong = 0
    for folder in map(RunFolder, run_folders(options.runs)):
        result, config = folder.read_result(), folder.read_config()
        if result is None or config is None or config.data.target == "none":
            continue
        target = config.data.target
        found = score_domains(load_model(folder.model_file), DomainSubset(dataset, (target,)))[target]["accuracy"]
        same = found == result["test_accuracy"]
        n_wrong += not same
        print(f"{'same' if same else 'WRONG'}  {found:.4f}  {folder.path}", flush=True)
    sys.exit(1 if n_wrong else 0)


if __name__ == "__main__":
    main()
