"""Every quantizer × objective × step rule × averager: trains, resumes bit for bit, and ships a file that answers alike.

    python tests/stress/contract.py [--out runs/contract] [--only TEXT …]

Each cell is a run of three steps on the embedded digits, and the same run resumed behind the second. What passed is not
run again by the same version of the program, so that the command can be stopped and started; failures are listed at the
end and are the exit code. `make test` runs a part of the cells in which every pair of members meets.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import qtdog
from qtdog.core.config import Config
from qtdog.core.config_io import build_config, load_preset
from qtdog.data.dataset import DomainSubset
from qtdog.data.known_datasets import RotatedDigits
from qtdog.models.feature_layers import FEATURE_LAYERS
from qtdog.quantizers.registry import QUANTIZERS
from qtdog.runs.folder import RunFolder
from qtdog.training.build import AVERAGERS, OBJECTIVES, STEP_RULES
from qtdog.training.checkpoint import checkpoint_folders, read_checkpoint
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, no_health_check, run

MEMBERS = {
    "objective": OBJECTIVES,
    "quantizer": QUANTIZERS,
    "averager": AVERAGERS,
    "step_rule": STEP_RULES,
    "feature_layer": FEATURE_LAYERS,
}
AXES = {
    "quantizer": ["none", *QUANTIZERS],
    "objective": list(OBJECTIVES),
    "step_rule": list(STEP_RULES),
    "averager": list(AVERAGERS),
}
DOMAINS = ("0", "30", "60")
START, MIDDLE, STEPS = 1, 2, 3
TINY = {
    # every domain is a source, so that an evaluation is of a few held-out images only
    "data": {"target": "none", "holdout_frac": 0.02, "batch_size": 4, "image_size": 8, "workers": 0},
    "train": {"steps": STEPS, "eval_every": MIDDLE},
}
# What members need, and what lets them act within three steps.
PARAMS = {
    "sma": {"start": 1},
    "ema": {"start": 1},
    "swa": {"start": 1, "every": 1},
    "swad": {"n_converge": 1, "n_tolerance": 1},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "inq": {"stages": (0.5, 1.0)},
    "gptq": {"calibration_images": 12},
    "obc": {"calibration_images": 12},
}
# The context network is wider than all the rest: obc would take a minute for these two layers.
NEEDED: dict[str, dict[str, Any]] = {
    "arm": {
        "model": {"feature_layer": "context"},
        "quantizer": {"exclude": ["classifier", "context.layers.3", "context.layers.6"]},
    }
}
Cell = Mapping[str, str]


def all_cells(axes: Mapping[str, Sequence[str]]) -> list[Cell]:
    """Return the whole cross product."""
    return [dict(zip(axes, members, strict=True)) for members in itertools.product(*axes.values())]


def pairs_of(cell: Cell) -> set[frozenset[tuple[str, str]]]:
    """Return the pairs of members that meet in a cell."""
    return {frozenset(pair) for pair in itertools.combinations(cell.items(), 2)}


def pairwise_cells(axes: Mapping[str, Sequence[str]]) -> list[Cell]:
    """Return cells in which every pair of members of two axes meets at least once, few of them, always the same.

    Greedy: of the pairs still missing the first is taken, and the other axes get the members that add most new pairs.
    """
    missing: dict[frozenset[tuple[str, str]], None] = {}  # a set with an order
    for one, other in itertools.combinations(axes, 2):
        for members in itertools.product(axes[one], axes[other]):
            missing[frozenset(zip((one, other), members, strict=True))] = None
    cells = []
    while missing:
        cell = dict(sorted(next(iter(missing))))
        for axis in axes:
            if axis not in cell:
                cell[axis] = max(
                    axes[axis],
                    key=lambda name: sum(frozenset({(axis, name), met}) in missing for met in cell.items()),
                )
        cell = {axis: cell[axis] for axis in axes}
        cells.append(cell)
        for pair in pairs_of(cell):
            missing.pop(pair, None)
    return cells


def name_of(cell: Cell) -> str:
    """Return the members of a cell as one word."""
    return "+".join(cell.values())


def config_of(cell: Cell, content: str) -> Config:
    """Return the configuration of a cell's run; `content` is the data set's."""
    quantizer = {"name": cell["quantizer"], "bits": 4} | OPTIONS.get(cell["quantizer"], {})
    if cell["quantizer"] != "none":
        quantizer["start_step"] = START
    members = {axis: {"name": name, "params": PARAMS.get(name, {})} for axis, name in cell.items()}
    found = {"quantizer": quantizer, "data": {"content": content}}
    return build_config([load_preset("digits"), TINY, members | found, NEEDED.get(cell["objective"], {})])


def open_digits() -> tuple[DomainSubset, str]:
    """Return the data set, and the name of its content."""
    dataset = DomainSubset(RotatedDigits(), DOMAINS)
    return dataset, resolve(build_config([load_preset("digits")]), dataset).data.content


def check_cell(
    cell: Cell,
    dataset: DomainSubset,
    content: str,
    path: Path,
    end_of: Callable[[RunFolder], object] | None = None,
) -> None:
    """Run a cell in the folder `path`; what `end_of` says of its end must be the same when it is resumed.

    Raises:
        AssertionError: the resumed run differs.
        Exception: whatever a run raises; among it that the file does not give the network's logits.
    """
    config, folder = config_of(cell, content), RunFolder(path)
    end_of = end_of or last_state
    # three steps from a random start may fall to chance and mean nothing by it
    silent = RunCallbacks(warn=lambda text: None, make_health_check=no_health_check)
    run(config, dataset, folder, callbacks=silent)
    model, end = folder.model_file.read_bytes(), end_of(folder)
    newest = checkpoint_folders(folder.checkpoints)[-1]
    assert newest.name.endswith(str(STEPS)), newest
    shutil.rmtree(newest)
    folder.result_file.unlink()
    folder.model_file.unlink()
    run(config, dataset, folder, resume=True, callbacks=silent)
    assert end_of(folder) == end, "the resumed run ends in another state"
    assert folder.model_file.read_bytes() == model, "the resumed run ships another file"


def last_state(folder: RunFolder) -> dict[str, Any]:
    """Return what the last checkpoint holds: a hash of every part, and the state but for the time that it took."""
    newest = checkpoint_folders(folder.checkpoints)[-1]
    state = read_checkpoint(newest).state
    lines = [{key: value for key, value in line.items() if key != "trained_s"} for line in state["lines"]]
    hashes = json.loads((newest / "checkpoint.json").read_text())["body"]["files"]
    return {key: value for key, value in state.items() if key != "trained_s"} | {"lines": lines, "files": hashes}


def version() -> str:
    """Return a hash of the program's source: what passed with another one says nothing."""
    digest = hashlib.sha256()
    for file in sorted(Path(qtdog.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def passed_before(log: Path, now: str) -> set[str]:
    """Return the names of the cells that passed with this version."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {line["cell"] for line in lines if line["version"] == now and not line["error"]}


def run_cells(
    cells: Sequence[Cell], log: Path, *, check: Callable[..., None] = check_cell, now: str = ""
) -> dict[str, str]:
    """Run the cells that have not passed in version `now` of the program, log each, and return the errors by cell."""
    (dataset, content), now = open_digits(), now or version()
    errors: dict[str, str] = {}
    done = passed_before(log, now)
    missing = [cell for cell in cells if name_of(cell) not in done]
    for number, cell in enumerate(missing, 1):
        error = ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(cell, dataset, content, Path(folder) / "run")
            except Exception as found:  # a cell that fails must not hide the others
                error = errors[name_of(cell)] = f"{type(found).__name__}: {found}"
        with log.open("a") as stream:
            stream.write(json.dumps({"version": now, "cell": name_of(cell), "error": error}) + "\n")
        if error or number % 100 == 0:
            print(f"{number}/{len(missing)} {name_of(cell)} {error}", file=sys.stderr, flush=True)
    return errors


def main() -> None:
    """Run every cell that has not passed, and print what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/contract"))
    parser.add_argument("--only", nargs="*", default=[], help="cells that have all of these members")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cells = [cell for cell in all_cells(AXES) if set(options.only) <= set(cell.values())]
    errors = run_cells(cells, options.out / "cells.jsonl")
    print(json.dumps({"cells": len(cells), "failed": errors}, indent=1))
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
