"""Run folders, an ensemble and a DomainBed file with made-up numbers, in milliseconds: what reports are tested on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtdog.core.config import Config, config_hash
from qtdog.core.config_io import build_config, to_yaml
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import Record, Score, SourceRecord
from qtdog.runs.selection import select

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
BASE = {"data": {"source": "pacs", "content": "ab" * 32}, "train": {"steps": 100, "eval_every": 20}}


def swing(*parts: object) -> float:
    """Return a number in [-1, 1] that looks random and is the same on every machine."""
    text = " ".join(map(str, parts))
    return math.sin(sum((i + 1) * ord(c) for i, c in enumerate(text)) * 12.9898)


def records(config: Config, *, level: float = 0.6) -> list[Record]:
    """Return evaluations that rise with the steps and dip where quantization starts."""
    data, made = config.data, []
    start = config.start_step
    for step in range(20, config.train.steps + 1, 20):
        base = level + 0.2 * step / config.train.steps - (0.15 if start is not None and step == start + 20 else 0)
        key = (config.quantizer.name, data.trial, config.train.seed, step)
        on_sources = {d: min(1.0, round(base + 0.1 + 0.03 * swing(d, *key), 4)) for d in DOMAINS if d != data.target}
        source = {domain: Score(accuracy, 0.5, 100) for domain, accuracy in on_sources.items()}
        target = round(base - 0.1 + 0.05 * swing(data.target, *key), 4)
        # 500 images of the target, 400 of them in the 80 % split
        test, test_in = {data.target: Score(target, 0.9, 500)}, {data.target: Score(round(target + 0.004, 4), 0.9, 400)}
        made.append(Record(SourceRecord(step, start is None or step > start, source), test, test_in, 0.7))
    return made


def make_run(path: Path, *, dataset: str = "pacs", level: float = 0.6, **changes: Mapping[str, Any]) -> Path:
    """Write the folder of a finished run."""
    config = build_config([BASE, changes])
    folder = RunFolder(path)
    path.mkdir(parents=True)
    folder.config_file.write_text(to_yaml(config))
    made = records(config, level=level)
    folder.rewrite_metrics([record.to_json() for record in made])
    folder.result_file.write_text(json.dumps(result_of(config, made, dataset)))
    return path


def result_of(config: Config, made: Sequence[Record], dataset: str) -> dict[str, Any]:
    """Return what `result.json` says of a run with these evaluations."""
    step = select(config.train.selection, made)
    chosen = next(record for record in made if record.seen.step == step)
    ratio = 1.0 if config.quantizer.name == "none" else 4.02
    return {
        "config_hash": config_hash(config),
        "target_domain": config.data.target,
        "source_domains": [domain for domain in DOMAINS if domain != config.data.target],
        "test_mode": config.data.test_mode,
        "selection": config.train.selection,
        "selected_step": step,
        "source_accuracy": chosen.seen.source_accuracy,
        "test_accuracy": chosen.test_accuracy,
        "test_accuracy_80": {domain: score.accuracy for domain, score in chosen.test_in.items()},
        "dataset": dataset,
        "size": {"bytes": int(13_718_732 / ratio), "float32_bytes": 13_718_732, "ratio": ratio},
        "environment": {"cpu": "a machine", "n_cores": 2, "torch": "2.6", "gpu": None},
        "classes": {"test": {config.data.target: classes_of(chosen)}},
        "calibration": {"test": {"risk_coverage": risk_of(chosen)}},
    }


def classes_of(chosen: Record) -> list[dict[str, Any]]:
    """Return how the images of two classes were answered, 300 dogs and 200 horses."""
    (score,) = chosen.test.values()
    n_wrong = round(500 * (1 - score.accuracy))
    dogs = min(200, n_wrong // 2)
    return [
        {"class": "dog", "n": 300, "right": 300 - dogs, "called": {"horse": dogs}},
        {"class": "horse", "n": 200, "right": 200 - (n_wrong - dogs), "called": {"dog": n_wrong - dogs}},
    ]


def risk_of(chosen: Record) -> list[list[float]]:
    """Return errors that rise with the share of answered images."""
    (score,) = chosen.test.values()
    return [[share, round((1 - score.accuracy) * share, 4)] for share in (0.25, 0.5, 0.75, 1.0)]


def make_ensemble(path: Path, members: Sequence[Path]) -> Path:
    """Write the folder of an ensemble of runs."""
    configs = [RunFolder(member).read_config() for member in members]
    listed = [
        {"folder": f"../{member.name}", "trial": config.data.trial, "seed": config.train.seed}
        for member, config in zip(members, configs, strict=True)
        if config is not None
    ]
    first = json.loads((members[0] / "result.json").read_text())
    size = {"bytes": 9_000_000, "ratio": 1.5, "float32_models": 0.66}
    result = first | {"kind": "eoq", "members": listed, "size": size, "test_accuracy": first["test_accuracy"] + 0.02}
    result |= {"training_steps": 100 * len(members), "training_runs": len(members), "inference_passes": len(members)}
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(result))
    return path


def domainbed_level(trial: int, setting: int, target: int, step: int, *where: Any) -> float:
    """Return an accuracy that rises with the steps, is better with the second setting and worse on the target."""
    base = 0.5 + step / 1000 + 0.05 * setting - 0.1 * (where[0] == target)
    return base + 0.02 * swing(trial, setting, target, step, *where)


def make_domainbed(file: Path) -> Path:
    """Write a `results.jsonl` of one algorithm: two trials, two settings, every domain unseen once."""
    lines = []
    for trial, setting, target in ((t, s, d) for t in range(2) for s in range(2) for d in range(4)):
        args = {"dataset": "PACS", "algorithm": "ERM", "test_envs": [target], "trial_seed": trial}
        args |= {"hparams_seed": setting, "seed": 7 * trial + setting, "holdout_fraction": 0.2, "steps": 201}
        for step in (0, 100, 200):
            key = (trial, setting, target, step)
            accuracies = {
                f"env{d}_{part}_acc": domainbed_level(*key, d, part) for d in range(4) for part in ("in", "out")
            }
            lines.append(json.dumps({"args": args, "step": step, "loss": 1.0} | accuracies))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file


def make_study(root: Path) -> Path:
    """Write float and 7-bit runs on four unseen domains in three trials, 4-bit ones on two, and an ensemble."""
    for trial in range(3):
        for target in DOMAINS:
            problem = {"data": {"target": target, "trial": trial}, "train": {"seed": trial}}
            make_run(root / f"float-{target}-{trial}", **problem, quantizer={"name": "none"})
            make_run(root / f"lsq-{target}-{trial}", level=0.61, **problem)
    for target in DOMAINS[:2]:
        make_run(root / f"four-{target}", level=0.55, data={"target": target}, quantizer={"bits": 4})
    make_ensemble(root / "eoq", [root / f"lsq-photo-{trial}" for trial in range(3)])
    return root
