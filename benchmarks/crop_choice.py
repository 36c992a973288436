"""Which crops are better on unseen domains: the paired differences of the runs of `studies/crop.yaml`.

    python benchmarks/crop_choice.py runs/crop --sets sets [--json scores.json]

Every run trained on two domains. Its own target is one of the two others; the model is scored on the remaining one
here, which its data set left out. For a domain as the target of the choice, only runs count that never saw it, and only
their scores on the other held-out domain. Scores are kept in the JSON file and not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

import qtdog
from qtdog.runs.statistics import compare_values

CROPS = ("cached", "original")


@dataclass(frozen=True)
class Held:
    """One score: which run (crop, seed, sources), and on which held-out domain."""

    crop: str
    seed: int
    sources: tuple[str, ...]
    domain: str
    accuracy: float
    trained_s: float
    source_accuracy: float

    @property
    def pair(self) -> tuple[tuple[str, ...], str, int]:
        """What two runs have in common that differ in their crops alone."""
        return self.sources, self.domain, self.seed


def scores_of(run: Path, sets: Path) -> list[Held]:
    """Return the two scores of a finished run."""
    result = json.loads((run / "result.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    left_out = result["dataset"].removeprefix("without-")
    found = qtdog.load(run).evaluate(sets / f"only-{left_out}", progress=False)
    accuracies = {result["target_domain"]: result["test_accuracy"], left_out: found.domains[left_out]["accuracy"]}
    known = {"crop": config["data"].get("crop", CROPS[0]), "seed": config["train"].get("seed", 0)}
    rest = {"trained_s": result["trained_s"], "source_accuracy": result["source_accuracy"]}
    sources = tuple(result["source_domains"])
    return [Held(**known, sources=sources, domain=name, accuracy=a, **rest) for name, a in accuracies.items()]


def differences(scores: Sequence[Held], name: str) -> None:
    """Print original − cached over the pairs of runs that both have."""
    by_crop = {crop: {score.pair: score for score in scores if score.crop == crop} for crop in CROPS}
    pairs = sorted(by_crop[CROPS[0]].keys() & by_crop[CROPS[1]].keys())
    if not pairs:
        print(f"| {name} | 0 | | | |")
        return
    first, second = ([by_crop[crop][pair].accuracy for pair in pairs] for crop in CROPS)
    result = compare_values(first, second)
    low, high = (f"{100 * end:+.1f}" if end is not None else "" for end in (result.low, result.high))
    means = [f"{100 * sum(values) / len(values):.1f}" for values in (first, second)]
    print(f"| {name} | {len(pairs)} | {means[0]} | {means[1]} | {100 * result.mean:+.1f} ({low} … {high}) |")


def main() -> None:
    """Score what is new, and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--sets", type=Path, required=True, help="folder with only-DOMAIN for each domain")
    parser.add_argument("--json", type=Path, default=Path("crop-scores.json"))
    options = parser.parse_args()
    kept = json.loads(options.json.read_text()) if options.json.is_file() else {}
    for file in sorted(options.runs.glob("*/*/result.json")):
        if file.parent.name not in kept:
            kept[file.parent.name] = [asdict(score) for score in scores_of(file.parent, options.sets)]
            options.json.write_text(json.dumps(kept, indent=1) + "\n")
    scores = [Held(**one | {"sources": tuple(one["sources"])}) for both in kept.values() for one in both]
    domains = sorted({score.domain for score in scores})
    print("| held-out domain | pairs | cached | original | original − cached |\n| --- | --- | --- | --- | --- |")
    for domain in domains:
        differences([score for score in scores if score.domain == domain], f"`{domain}`")
    differences(scores, "all")
    print("\n| target of the choice | pairs | cached | original | original − cached |\n| --- | --- | --- | --- | --- |")
    for target in domains:
        differences([s for s in scores if target != s.domain and target not in s.sources], f"`{target}`")
    for crop in CROPS:
        own = {(score.sources, score.seed): score.trained_s for score in scores if score.crop == crop}
        print(f"\n{crop}: {sum(own.values()) / max(1, len(own)):.1f} s of training per run, {len(own)} runs", end="")
    print()


if __name__ == "__main__":
    main()
