"""What a cascade of two gives: a distilled student answers, and the ensemble, its teacher, only where it is uncertain.

    python benchmarks/student_first.py STUDENT ENSEMBLE [STUDENT ENSEMBLE …] --data DATA
                                       [--one 0.53] [--all 2.35] [--loss 0.1]

STUDENT is a run folder of `qtdog distill`, ENSEMBLE the folder of its teacher. An image is uncertain where the
student's probability is below a threshold: the lowest one with which both together lose at most --loss points against
the ensemble on the sources' validation images, which neither was trained on. Printed are the share of uncertain images,
the cost and the loss there and on the unseen domain, with the 95 % interval of the loss over images (bootstrap).

A cost is processor time ÷ that of one float model in the same runtime: --one for a pass of the INT8 student, --all for
the INT8 ensemble (docs/results/benchmarks.md; `benchmarks/latency.py` measures them). cost = one + share · all.

The last columns are the least loss that *any* threshold reaches at a cost of 1.0 or less, chosen on the very images:
what no choice on the sources can beat.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

import qtdog
from qtdog.data.open import open_any
from qtdog.ensemble.model import read_member
from qtdog.ensemble.prediction import collect_logits
from qtdog.ensemble.scoring import EvaluationSet, open_evaluation_set
from qtdog.training.evaluation import EvaluationInputs

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
N_BOOTSTRAP = 2000


@dataclass(frozen=True)
class Answers:
    """What student and ensemble said of n images.

    Attributes:
        probability: of the student's answer, (n,).
        student: whether it is right, (n,).
        ensemble: whether the ensemble's is, (n,).
    """

    probability: Floats
    student: Bools
    ensemble: Bools

    def together(self, threshold: float) -> Bools:
        """Return which answers are right if the ensemble is asked below a threshold."""
        return np.where(self.probability < threshold, self.ensemble, self.student)

    def loss(self, threshold: float) -> Floats:
        """Return what each image loses against the ensemble, in points: −100, 0 or 100."""
        return 100 * (self.ensemble.astype(float) - self.together(threshold))

    def share(self, threshold: float) -> float:
        """Return the share of images for which the ensemble is asked."""
        return float((self.probability < threshold).mean())


def choose_threshold(sources: Answers, allowed_loss: float) -> float:
    """Return the lowest threshold that loses at most so many points, and none above it does.

    Example:
        >>> right, wrong = np.array([True, True]), np.array([False, True])
        >>> choose_threshold(Answers(np.array([0.6, 0.9]), wrong, right), 0.1)
        0.9
    """
    best = np.inf
    for value in np.unique(sources.probability)[::-1]:
        if sources.loss(value).mean() > allowed_loss:
            break
        best = float(value)
    return best


def least_loss(answers: Answers, one: float, whole: float) -> float:
    """Return the least mean loss of any threshold whose cost is at most that of one float model."""
    values = [*np.unique(answers.probability), np.inf]
    return min(answers.loss(value).mean() for value in values if one + answers.share(value) * whole <= 1)


def interval(losses: Floats) -> tuple[float, float]:
    """Return the 95 % interval of a mean over images, by the bootstrap (seed 0)."""
    draws = np.random.default_rng(0).integers(0, len(losses), (N_BOOTSTRAP, len(losses)))
    low, high = np.quantile(losses[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def read_answers(student: Path, ensemble: Path, data: str) -> tuple[str, Answers, Answers]:
    """Return the name of the unseen domain, and the answers on source validation images and on all its images."""
    config = read_member(student).config
    about = json.loads((ensemble / "result.json").read_text())
    seeds = {(member["trial"]) for member in about["members"]}
    if seeds != {config.data.trial}:
        raise SystemExit(f"{student} and the members of {ensemble} held out different images")
    images = open_evaluation_set(config, open_any(data), same_splits=True)
    target = str(images.protocol.target)
    held_out = np.concatenate(list(images.protocol.selection_sets().values()))
    models = [qtdog.load(path / "model.safetensors") for path in (student, ensemble)]
    found = [_answers(models, images, indices) for indices in (held_out, images.dataset.indices(target))]
    return target, found[0], found[1]


def _answers(models: list[qtdog.TrainedModel], images: EvaluationSet, indices: npt.NDArray[np.int64]) -> Answers:
    preprocessing = models[0].model.info.preprocessing
    inputs = EvaluationInputs(images.cache, images.dataset.class_index, preprocessing.mean, preprocessing.std)
    student, whole = (collect_logits(one.model, inputs.batches(indices), torch.device("cpu")) for one in models)
    probability, answer = (student.logits.mean(0) / models[0].model.info.temperature).softmax(1).max(1)
    right = whole.logits.mean(0).argmax(1) == whole.labels
    return Answers(probability.double().numpy(), (answer == student.labels).numpy(), right.numpy())


def main() -> None:
    """Print a row for each pair on sources and unseen domain, and their means with t intervals over pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="STUDENT ENSEMBLE, in turns")
    parser.add_argument("--data", required=True)
    parser.add_argument("--one", type=float, default=0.53, help="INT8 student ÷ one float model, processor time")
    parser.add_argument("--all", type=float, default=2.35, help="all members INT8 ÷ one float model")
    parser.add_argument("--loss", type=float, default=0.1, help="points that may be lost on the sources")
    options = parser.parse_args()
    print("| images | n | ensemble | student | both | loss (interval) | uncertain | cost | least loss at cost 1 |")
    print(f"{'| --- ' * 9}|")
    rows = []
    for student, ensemble in zip(options.runs[::2], options.runs[1::2], strict=True):
        target, on_sources, on_target = read_answers(student, ensemble, options.data)
        threshold = choose_threshold(on_sources, options.loss)
        for name, answers in (("sources, not " + target, on_sources), (f"{target}, unseen", on_target)):
            losses, share = answers.loss(threshold), answers.share(threshold)
            cost, low_high = options.one + share * options.all, interval(losses)
            least = least_loss(answers, options.one, options.all)
            rates = [100 * part.mean() for part in (answers.ensemble, answers.student, answers.together(threshold))]
            text = f"{losses.mean():.2f} ({low_high[0]:.2f} … {low_high[1]:.2f})"
            scores = " | ".join(f"{rate:.2f}" for rate in rates)
            print(
                f"| {name} | {len(losses)} | {scores} | {text} | {share:.1%} | {cost:.2f} | {least:.2f} |", flush=True
            )
        rows.append((losses.mean(), share, cost, least))
    if len(rows) > 1:
        columns = np.array(rows).T
        halves = stats.t.ppf(0.975, len(rows) - 1) * columns.std(1, ddof=1) / np.sqrt(len(rows))
        for name, mean, half in zip(("loss", "share", "cost", "least loss"), columns.mean(1), halves, strict=True):
            print(f"unseen, {len(rows)} pairs, mean {name}: {mean:.3f} ({mean - half:.3f} … {mean + half:.3f})")


if __name__ == "__main__":
    main()
