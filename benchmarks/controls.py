"""Every quantizer and control on one unseen domain: what they train to, and what their files say.

    python benchmarks/controls.py --data DATA --target DOMAIN [--preset pacs-lite] [--out runs/controls] [--only NAME …]

Each row is a run of `qtdog train --preset PRESET --preset NAME`. All share their float steps, which are trained once;
that changes no bit of a result. What is finished in the output folder is not trained again, so that the command can be
stopped and started. A run that stops with a diagnosis is a row too. Every file is loaded again and scored on the unseen
domain, and must give the accuracy that its run recorded. Writes `controls.json` and `controls.md` there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from qtdog.cli.evaluate import score_domains
from qtdog.cli.plan import Planned, Request, make_plan
from qtdog.core.config import AFTER_TRAINING
from qtdog.core.errors import CollapseError
from qtdog.core.files import write_atomic
from qtdog.data.dataset import DomainDataset
from qtdog.data.subset import DomainSubset
from qtdog.report.table import markdown, percent, size_text
from qtdog.training.checkpoint import Checkpoint, checkpoint_folders, read_checkpoint
from qtdog.training.fork import train_prefix
from qtdog.training.result import environment
from qtdog.training.run import Voice, run
from qtdog.training.run_folder import RunFolder
from qtdog.training.shipped import load

NAMES = (
    "float",
    "float-decay",
    "freeze",
    "released",
    "lsq",
    "lsq-decay",
    "lsq-frozen-step",
    "lsq-stochastic",
    "lsq-4bit",
    "lsq-raw-adam",
    "ste",
    "dorefa",
    "inq",
    "noise-accumulated",
    "noise-fresh",
    "noise-matched",
    "noise-then-round",
    "rtn",
    "gptq",
    "obc",
)


def say(text: str) -> None:
    """Print to standard error at once."""
    print(text, file=sys.stderr, flush=True)


def beginning(name: str, first: Planned, dataset: DomainDataset, out: Path) -> Checkpoint:
    """Return where a run begins: the shared float steps, or for a method after training most of the float run."""
    finished = checkpoint_folders(RunFolder(out / "float").checkpoints)
    if name in AFTER_TRAINING and len(finished) > 1:
        return read_checkpoint(finished[-2])
    return train_prefix(first.config, dataset, RunFolder(out / "prefix"), voice=Voice(warn=say))


def one_row(planned: Planned, dataset: DomainDataset, prefix: Checkpoint, start: int) -> dict[str, Any]:
    """Make one run and return what the table says of it."""
    folder = planned.folder
    try:
        result = run(planned.config, dataset, folder, resume=True, voice=Voice(warn=say), fork_from=prefix)
    except CollapseError as error:
        return {"stopped": str(error)}
    after = [record.test_accuracy for record in folder.read_metrics() if record.seen.step > start]
    known = [accuracy for accuracy in after if accuracy is not None]
    target = planned.config.data.target
    again = score_domains(load(folder.model_file), DomainSubset(dataset, (target,)))[target]["accuracy"]
    if again != result["test_accuracy"]:
        raise SystemExit(f"{folder.model_file} gives {again}, its run recorded {result['test_accuracy']}")
    keys = ("config_hash", "selected_step", "source_accuracy", "test_accuracy", "size", "trained_s")
    spread = statistics.pstdev(known)
    return {key: result[key] for key in keys} | {"mean_after_start": statistics.mean(known), "std_after_start": spread}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = []
    for name, row in rows.items():
        if "stopped" in row:
            lines.append([name, "stopped", "", "", "", row["stopped"].split(". ")[0]])
            continue
        spread = f"{percent(row['mean_after_start'])} ± {percent(row['std_after_start'])}"
        step, size = str(row["selected_step"]), size_text(row["size"])
        lines.append([name, percent(row["test_accuracy"]), spread, percent(row["source_accuracy"]), step, size])
    return markdown(["preset", "unseen", "mean after start", "source", "step", "file"], lines)


def main() -> None:
    """Make the runs that are missing and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--preset", default="pacs-lite")
    parser.add_argument("--out", type=Path, default=Path("runs/controls"))
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    flags = {"data": options.data, "target": options.target}
    _, (first,) = make_plan(Request(flags, [options.preset, "lsq"], out=options.out / "lsq"))
    start = first.config.start_step
    assert start is not None
    for name in options.only:
        request = Request(flags, [options.preset, name], out=options.out / name)
        dataset, (planned,) = make_plan(request)
        prefix = beginning(name, first, dataset, options.out)
        rows[name] = one_row(planned, dataset, prefix, start)
        say(f"{name}: {rows[name].get('test_accuracy', 'stopped')}")
        about = {"preset": options.preset, "target": options.target, "start_step": start, "rows": rows}
        write_atomic(options.out / "controls.json", json.dumps(about | {"environment": environment()}, indent=1))
        write_atomic(options.out / "controls.md", table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
