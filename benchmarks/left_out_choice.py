"""Which method would the sources choose? Leave-one-source-domain-out: paired differences of the runs of a study.

    python benchmarks/left_out_choice.py RUNS --sets SETS --reference METHOD [--method NAME ...] [--json scores.json]
    python benchmarks/left_out_choice.py --reference METHOD --json scores.json

`studies/crop.yaml` and `studies/levers-pacs.yaml` say how the runs and sets are made. Every run trained on two domains.
Its own target is one of the two others; the model is scored on the remaining one here, which its data set left out. For
a domain as the target of the choice, only runs count that never saw it, and only their scores on the other held-out
domain. Scores are kept in the JSON file and not made again; without RUNS the tables are of what is kept. With --method
only these methods are scored and shown, beside the reference.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import qtdog
from qtdog.runs.find import find_runs
from qtdog.runs.finished import FinishedRun
from qtdog.runs.statistics import compare_values


@dataclass(frozen=True)
class Held:
    """One score: which run (method, seed, sources), and on which held-out domain."""

    method: str
    seed: int
    sources: tuple[str, ...]
    domain: str
    accuracy: float
    trained_s: float
    source_accuracy: float
    file_bytes: int

    @property
    def pair(self) -> tuple[tuple[str, ...], str, int]:
        """What two runs have in common that differ in their method alone."""
        return self.sources, self.domain, self.seed


def scores_of(run: FinishedRun, sets: Path) -> list[Held]:
    """Return the two scores of a finished run."""
    result, config = run.result, run.config
    assert config is not None
    left_out = result["dataset"].removeprefix("without-")
    found = qtdog.load(run.path).evaluate(sets / f"only-{left_out}", progress=False)
    accuracies = {result["target_domain"]: result["test_accuracy"], left_out: found.domains[left_out]["accuracy"]}
    return [
        Held(
            method=run.names[0],
            seed=config.train.seed,
            sources=tuple(result["source_domains"]),
            domain=domain,
            accuracy=accuracy,
            trained_s=result["trained_s"],
            source_accuracy=result["source_accuracy"],
            file_bytes=result["size"]["bytes"],
        )
        for domain, accuracy in accuracies.items()
    ]


def cell(scores: Sequence[Held], method: str, reference: str) -> str:
    """Return the accuracy of a method, with its paired difference to the reference and the 95 % t interval."""
    own, base = (
        {score.pair: score.accuracy for score in scores if score.method == name} for name in (method, reference)
    )
    if not own:
        return ""
    mean = f"{100 * sum(own.values()) / len(own):.1f}"
    pairs = sorted(own.keys() & base.keys())
    if method == reference or not pairs:
        return mean
    result = compare_values([base[pair] for pair in pairs], [own[pair] for pair in pairs])
    low, high = (f"{100 * end:+.1f}" if end is not None else "" for end in (result.low, result.high))
    return f"{mean}, {100 * result.mean:+.1f} ({low} … {high}; {len(pairs)})".replace("-", "−")


def table(head: str, columns: dict[str, list[Held]], methods: Sequence[str], reference: str) -> None:
    """Print a column for each group of scores and a row for each method."""
    print(f"\n| {head} | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for method in methods:
        cells = [cell(scores, method, reference) for scores in columns.values()]
        print(f"| {method} | " + " | ".join(cells) + " |")


def tables(kept: Sequence[dict[str, Any]], reference: str, only: Sequence[str] = ()) -> None:
    """Print accuracies and paired differences, by held-out domain and by target of the choice.

    Args:
        kept: scores, as the JSON file has them.
        reference: method that the others are compared with.
        only: the other methods; all if it is empty.

    Raises:
        SystemExit: a method without a score.
    """
    known = {one["method"] for one in kept}
    for name in (reference, *only):
        if name not in known:
            raise SystemExit(f"no finished run is called '{name}'. Scored: {', '.join(sorted(known)) or 'none'}")
    methods = [reference, *sorted((set(only) or known) - {reference})]
    scores = [Held(**{**one, "sources": tuple(one["sources"])}) for one in kept if one["method"] in methods]
    domains = sorted({score.domain for score in scores})
    held_out = {domain: [score for score in scores if score.domain == domain] for domain in domains}
    choices = {t: [s for s in scores if t != s.domain and t not in s.sources] for t in domains}
    table("held-out domain:", held_out | {"all": scores}, methods, reference)
    table("target of the choice:", choices, methods, reference)
    print()
    for method in methods:
        own = {(score.sources, score.seed): score for score in scores if score.method == method}.values()
        right = sum(100 * score.source_accuracy for score in own) / len(own)
        size = sum(score.file_bytes / 1e6 for score in own) / len(own)
        spent = sum(score.trained_s for score in own) / len(own)
        print(
            f"- {method}: {len(own)} runs of {spent:.0f} s, held-out images of the sources {right:.1f} %, {size:.2f} MB"
        )


def main() -> None:
    """Score what is new, and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", help="folder of the study's runs; default: only what is kept")
    parser.add_argument("--sets", type=Path, help="folder with only-DOMAIN for each domain")
    parser.add_argument("--reference", required=True, help="method that the others are compared with")
    parser.add_argument("--method", action="append", default=[], help="only this one; may be given several times")
    parser.add_argument("--json", type=Path, default=Path("left-out-scores.json"))
    options = parser.parse_args()
    if options.runs and not options.sets:
        parser.error("RUNS needs --sets: the images that runs are scored on")
    kept = json.loads(options.json.read_text()) if options.json.is_file() else {}
    for run in find_runs([options.runs]).runs if options.runs else ():
        is_wanted = not options.method or run.names[0] in (options.reference, *options.method)
        if is_wanted and run.path.name not in kept:
            kept[run.path.name] = [asdict(score) for score in scores_of(run, options.sets)]
            options.json.write_text(json.dumps(kept, indent=1) + "\n")
    tables([score for both in kept.values() for score in both], options.reference, options.method)


if __name__ == "__main__":
    main()
