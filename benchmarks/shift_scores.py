"""Under which kind of shift does a method help? Every finished run, scored on its unseen domain under corruptions.

    python benchmarks/shift_scores.py RUNS --data DATA [--json scores.json] [--severity 2 --severity 4]
                                      [--limit 300] [--round 7] [--reference float]

RUNS is the folder of a sweep, such as that of `studies/shift-office.yaml`. The corrupted images of a domain are made
once and seen by every model. Scores are kept in the JSON file and not made again, so that the script may run while the
sweep does. The table is of differences to `--reference`, paired by target and seed: of the mean over the severities and
the corruptions of a family. The target has no part in training or in the choice of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtdog.conversion.attach import attach
from qtdog.conversion.calibrate import calibrate_
from qtdog.core.config import Config
from qtdog.data.corruptions import FAMILIES, SEVERITIES, corrupt, corruption_names
from qtdog.data.dataset import DomainDataset, require_images
from qtdog.data.decoded_cache import DecodedCache
from qtdog.data.open import open_dataset
from qtdog.ensemble.scoring import open_for
from qtdog.runs.find import run_folders
from qtdog.runs.folder import RunFolder
from qtdog.runs.statistics import Comparison, compare_values
from qtdog.training.load_model import load_model

CLEAN = "clean"
ALL = "all corruptions"
COLUMNS = (CLEAN, *FAMILIES, ALL)
BATCH = 200
USUAL_BACKBONE = "tf_efficientnet_lite0"


class CorruptedDomain:
    """The images of one domain, uint8 (n, C, H, W) for each corruption and severity, made once.

    Args:
        images: decoded images of the whole data set.
        positions: of the images that are scored, in the data set; they are the keys of the random draws.
    """

    def __init__(self, images: DecodedCache, positions: Sequence[int]) -> None:
        self.positions = positions
        self.clean = torch.cat([images.gather([p]).clone() for p in positions]).permute(0, 3, 1, 2).contiguous()
        self._made: dict[tuple[str, int], Tensor] = {}

    def under(self, name: str, severity: int) -> Tensor:
        """Return the images under a corruption, as `qtdog eval --corrupt` makes them."""
        if name == CLEAN:
            return self.clean
        key = (name, severity)
        if key not in self._made:
            self._made[key] = corrupt(self.clean, name, severity, keys=self.positions)
        return self._made[key]


def chosen(dataset: DomainDataset, domain: str, limit: int) -> list[int]:
    """Return the positions of at most `limit` images of a domain, drawn with a fixed seed, or of all of them."""
    positions = torch.as_tensor(dataset.indices(domain))
    if limit and len(positions) > limit:
        order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))
        positions = positions[order[:limit]].sort().values
    return [int(position) for position in positions]


@torch.inference_mode()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers for uint8 images (n, C, H, W) and class indices (n,)."""
    how = model.info.preprocessing
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (how.mean, how.std))
    right = 0
    for start in range(0, len(images), BATCH):
        inputs = ((images[start : start + BATCH].float() / 255 - mean) / std).contiguous(
            memory_format=torch.channels_last
        )
        right += int((model(inputs).argmax(1) == labels[start : start + BATCH]).sum())
    return right / len(images)


def score_run(
    folder: RunFolder,
    domains: dict[str, CorruptedDomain],
    dataset: DomainDataset,
    options: argparse.Namespace,
    rounded: int = 0,
) -> dict[str, Any]:
    """Return the accuracies of one finished run on its unseen domain: `corruption/severity` → share.

    With `rounded`, each weight of its file is rounded to the nearest point of a grid of so many bits before that.
    """
    config = folder.read_config()
    assert config is not None
    target = config.data.target
    model = load_model(folder.model_file).eval()
    if rounded:
        attach(model.network, quantizer="rtn", bits=rounded, init="mse")
        calibrate_(model.network, "rtn")
    images, labels = open_for(model, dataset, None)
    if not isinstance(images, DecodedCache):
        raise SystemExit("corruptions are for images")
    if target not in domains:
        domains[target] = CorruptedDomain(images, chosen(dataset, target, options.limit))
    domain = domains[target]
    right = torch.as_tensor(labels)[domain.positions]
    cells = [(CLEAN, 0)] + [(name, level) for name in corruption_names(["all"]) for level in options.severity]
    result = folder.read_result() or {}
    return {
        "method": method_of(config) + (f", rounded to {rounded} bits afterwards" if rounded else ""),
        "target": target,
        "seed": config.train.seed,
        "n": len(domain.positions),
        "file_bytes": 0 if rounded else folder.model_file.stat().st_size,
        "source_accuracy": result.get("source_accuracy"),
        "test_accuracy": result.get("test_accuracy"),
        "scores": {f"{name}/{level}": accuracy(model, domain.under(name, level), right) for name, level in cells},
    }


def method_of(config: Config) -> str:
    """Return the method of a run: quantizer, bits, width of the noise, averager."""
    name, width = config.quantizer.name, config.quantizer.noise_width
    text = "float" if name == "none" else f"{name}, {config.quantizer.bits} bits"
    text += "" if width == 1 else f", noise of {width:g} steps"
    text += "".join(f", {layers} {bits} bits" for layers, bits in config.quantizer.layer_bits.items())
    text += ", from the average on" if config.quantizer.start_from == "average" else ""
    text += "" if config.averager.name == "none" else f", {config.averager.name}"
    # What the studies leave as it is, so that other runs of the same folder are rows of their own.
    data, objective = config.data, config.objective
    quantizer = config.quantizer
    others = {
        f"activations {quantizer.activation_bits} bits": bool(quantizer.activation_bits),
        f"step size {quantizer.step_mode}": quantizer.step_mode != "log",
        f"learning rate {config.optimizer.schedule}": config.optimizer.schedule != "constant",
        config.model.backbone: config.model.backbone != USUAL_BACKBONE,
        f"augment {data.augment}": data.augment != "domainbed",
        f"label noise {data.label_noise:g}": data.label_noise > 0,
        f"objective {objective.name}": objective.name != "erm",
        f"teacher {objective.teacher_sha256[:8]}": bool(objective.teacher_sha256),
    }
    return ", ".join([text, *(name for name, is_told in others.items() if is_told)])


def family_means(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the mean accuracy clean, under each family and under all corruptions."""
    groups: dict[str, list[float]] = defaultdict(list)
    family = {member: name for name, members in FAMILIES.items() for member in members}
    for cell, share in scores.items():
        name = cell.split("/")[0]
        groups[family.get(name, CLEAN)].append(share)
        if name != CLEAN:
            groups[ALL].append(share)
    return {name: sum(values) / len(values) for name, values in groups.items()}


def text(one: Comparison) -> str:
    """Return a difference in points with its 95 % t interval."""
    if one.low is None or one.high is None:
        return f"{100 * one.mean:+.1f}".replace("-", "−")
    bold = "**" if one.low * one.high > 0 else ""
    whole = f"{bold}{100 * one.mean:+.1f}{bold} ({100 * one.low:+.1f} … {100 * one.high:+.1f})"
    return whole.replace("-", "−")


def by_method(runs: Sequence[dict[str, Any]]) -> dict[str, dict[tuple[str, int], dict[str, float]]]:
    """Return for each method its runs by (target, seed), as means of families.

    Raises:
        ValueError: two runs have one name; they differ in something that `method_of` does not tell.
    """
    found: dict[str, dict[tuple[str, int], dict[str, float]]] = defaultdict(dict)
    for run in runs:
        method, pair = run["method"], (run["target"], run["seed"])
        if pair in found[method]:
            raise ValueError(
                f"two runs are called '{method}' with target and seed {pair}: score them in folders of their own"
            )
        found[method][pair] = family_means(run["scores"])
    return found


def differences(runs: Sequence[dict[str, Any]], method: str, reference: str) -> dict[str, Comparison]:
    """Return method − reference for each column, over the pairs of target and seed; empty without one."""
    found = by_method(runs)
    own, base = found[method], found[reference]
    pairs = sorted(own.keys() & base.keys())
    if not pairs:
        return {}
    return {name: compare_values([base[p][name] for p in pairs], [own[p][name] for p in pairs]) for name in COLUMNS}


def megabytes(runs: Sequence[dict[str, Any]], method: str) -> str:
    """Return the mean size of a method's files; empty if there is none, as for what is rounded here."""
    sizes = [run["file_bytes"] for run in runs if run["method"] == method]
    return f"{sum(sizes) / len(sizes) / 1e6:.2f}" if all(sizes) else ""


def tables(runs: Sequence[dict[str, Any]], reference: str) -> None:
    """Print the accuracy of the reference and the paired differences of every other method."""
    found = by_method(runs)
    if reference not in found:
        names = ", ".join(sorted(found)) or "none; links are not followed"
        raise SystemExit(f"no finished run is called '{reference}'. Scored: {names}")
    print("| method | file, MB | pairs | " + " | ".join(COLUMNS) + " |\n|" + " --- |" * (len(COLUMNS) + 3))
    own = found[reference].values()
    means = [f"{100 * sum(run[name] for run in own) / len(own):.1f} %" for name in COLUMNS]
    print(f"| {reference} | {megabytes(runs, reference)} | {len(own)} | " + " | ".join(means) + " |")
    for method in sorted(found.keys() - {reference}):
        compared = differences(runs, method, reference)
        if compared:
            start = f"| {method} | {megabytes(runs, method)} | {compared[CLEAN].n} | "
            print(start + " | ".join(text(compared[name]) for name in COLUMNS) + " |")


def main() -> None:
    """Score what is new, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", type=Path, default=Path("shift-scores.json"))
    parser.add_argument("--severity", type=int, action="append", default=[])
    parser.add_argument("--limit", type=int, default=0, help="images of a domain at most; 0: all")
    parser.add_argument(
        "--round",
        type=int,
        action="append",
        default=[],
        help="score what trained with matched noise rounded to so many bits, too",
    )
    parser.add_argument("--reference", default="float")
    options = parser.parse_args()
    options.severity = options.severity or list(SEVERITIES)
    dataset = require_images(open_dataset(options.data))
    kept: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}
    domains: dict[str, CorruptedDomain] = {}
    for folder in map(RunFolder, run_folders(options.runs)):
        config = folder.read_config()
        if folder.read_result() is None or config is None:
            continue
        in_float = config.quantizer.name == "noise-matched"
        for bits in (0, *(options.round if in_float else ())):
            name = f"{folder.path.name}-{bits}" if bits else folder.path.name
            if name not in kept:
                kept[name] = score_run(folder, domains, dataset, options, bits)
                options.json.write_text(json.dumps(kept, indent=1) + "\n")
                print(name, kept[name]["method"], kept[name]["target"], flush=True)
    tables(list(kept.values()), options.reference)


if __name__ == "__main__":
    main()
