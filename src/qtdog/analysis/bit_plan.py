"""What is tried to choose the bits, checked before anything is trained, and the rule that chooses."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtdog.analysis.mixed_precision import require_grid
from qtdog.core.config import AFTER_TRAINING, Config, config_hash
from qtdog.core.config_io import build_config
from qtdog.core.errors import ConfigError, RunError, unknown
from qtdog.core.files import safe_name
from qtdog.core.quantized import MAX_BITS, MIN_BITS
from qtdog.data.dataset import DomainDataset, DomainSubset, ImageDataset
from qtdog.data.text import SEEN


@dataclass(frozen=True)
class BitTrial:
    """One candidate, trained without one source domain.

    Attributes:
        bits: of the candidate.
        left_out: the source domain that it did not see.
        accuracy: on all images of that domain, or under the plan's shift; None if the training failed.
        flatness: rise of the loss at distance `gamma`, on held-out images of the sources that it saw.
        flatness_error: standard error of `flatness` over the random directions.
        gamma: radius, in the units of the weights.
        n_bytes: size of its model file.
        failed: why there is no accuracy, or None.
    """

    bits: int
    left_out: str
    accuracy: float | None = None
    flatness: float | None = None
    flatness_error: float | None = None
    gamma: float | None = None
    n_bytes: int | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Candidate:
    """One bit-width over all left-out domains.

    Attributes:
        bits: per weight.
        accuracies: by left-out domain; None where the training failed.
        accuracy: their mean; None if one failed, and then so are all numbers below.
        standard_error: of that mean, from the spread over the domains.
        behind: mean over the domains of (accuracy of the best candidate - this one's).
        behind_error: standard error of `behind`: of the paired differences, so that what all candidates find hard in a
            domain does not count.
        flatness: mean over the domains.
        flatness_error: standard error of that mean from the random directions.
        n_bytes: size of the model file, the largest over the domains.
    """

    bits: int
    accuracies: dict[str, float | None]
    accuracy: float | None = None
    standard_error: float | None = None
    behind: float | None = None
    behind_error: float | None = None
    flatness: float | None = None
    flatness_error: float | None = None
    n_bytes: int | None = None

    @property
    def eligible(self) -> bool:
        """Whether it is the best, or not behind it by more than one standard error."""
        return self.behind is not None and self.behind_error is not None and self.behind <= self.behind_error


@dataclass(frozen=True)
class Choice:
    """What is recommended.

    Attributes:
        candidates: most bits first.
        best: the bits with the highest mean accuracy, of equal ones the flattest.
        bits: the recommendation: the fewest bits among the eligible candidates.
    """

    candidates: tuple[Candidate, ...]
    best: int
    bits: int


def choose(trials: Sequence[BitTrial]) -> Choice:
    """Return the recommendation: as few bits as can be had within one standard error of the best accuracy.

    The best candidate has the highest mean accuracy over the left-out domains, of equal ones the flattest. Another one
    is as good if it is behind by no more than one standard error of their paired differences (the rule of Breiman et
    al., *Classification and Regression Trees*, 1984, section 3.4.3, in its paired form). Of these the fewest bits win.

    Args:
        trials: every candidate without every domain, two domains or more.

    Raises:
        RunError: every candidate failed somewhere.

    Example:
        >>> scores = {7: (0.80, 0.70), 6: (0.81, 0.66), 4: (0.60, 0.50)}
        >>> table = [BitTrial(b, d, a, 0.1, 0.0, 1.0, b) for b in scores for d, a in zip("xy", scores[b])]
        >>> choice = choose(table)
        >>> choice.best, choice.bits
        (7, 6)
    """
    table: dict[int, dict[str, BitTrial]] = {}
    for trial in sorted(trials, key=lambda trial: -trial.bits):
        table.setdefault(trial.bits, {})[trial.left_out] = trial
    whole = {bits: row for bits, row in table.items() if all(trial.accuracy is not None for trial in row.values())}
    if not whole:
        reasons = "\n  ".join(f"{trial.bits} bits without {trial.left_out}: {trial.failed}" for trial in trials)
        raise RunError(f"no candidate could be trained without every domain:\n  {reasons}")
    best = max(whole, key=lambda bits: (_mean(_accuracies(whole[bits])), -_mean(_flatness(whole[bits])), -bits))
    candidates = tuple(
        _candidate(bits, row, whole[best]) if bits in whole else Candidate(bits, _known(row))
        for bits, row in table.items()
    )
    return Choice(candidates, best, min(candidate.bits for candidate in candidates if candidate.eligible))


def _candidate(bits: int, row: Mapping[str, BitTrial], best: Mapping[str, BitTrial]) -> Candidate:
    accuracies = _accuracies(row)
    behind = [other - own for own, other in zip(accuracies, _accuracies(_alike(best, row)), strict=True)]
    errors = [trial.flatness_error or 0.0 for trial in row.values()]
    return Candidate(
        bits=bits,
        accuracies=_known(row),
        accuracy=_mean(accuracies),
        standard_error=_standard_error(accuracies),
        behind=_mean(behind),
        behind_error=_standard_error(behind),
        flatness=_mean(_flatness(row)),
        flatness_error=math.hypot(*errors) / len(errors),
        n_bytes=max(trial.n_bytes or 0 for trial in row.values()),
    )


def _alike(other: Mapping[str, BitTrial], row: Mapping[str, BitTrial]) -> dict[str, BitTrial]:
    """Return another row in the order of this one, so that what is compared is the same domain."""
    return {domain: other[domain] for domain in row}


def _known(row: Mapping[str, BitTrial]) -> dict[str, float | None]:
    return {domain: trial.accuracy for domain, trial in row.items()}


def _accuracies(row: Mapping[str, BitTrial]) -> list[float]:
    return [trial.accuracy or 0.0 for trial in row.values()]


def _flatness(row: Mapping[str, BitTrial]) -> list[float]:
    return [trial.flatness or 0.0 for trial in row.values()]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


BRIEF_FRAC = 0.25  # of the steps after the start, if nothing else is asked for


def parse_candidates(text: str) -> tuple[int, ...]:
    """Return bit-widths from a list like `8,7,6`: most bits first, each once.

    Raises:
        ConfigError: not such a list, or bits out of range.

    Example:
        >>> parse_candidates("4, 8,6")
        (8, 6, 4)
    """
    try:
        found = {int(part) for part in text.split(",")}
    except ValueError as error:
        raise ConfigError(f"--candidates takes bits like 8,7,6,5,4; got '{text}'") from error
    wrong = sorted(bits for bits in found if not MIN_BITS <= bits <= MAX_BITS)
    if wrong:
        raise ConfigError(f"--candidates: bits must be {MIN_BITS} to {MAX_BITS}, not {wrong[0]}")
    return tuple(sorted(found, reverse=True))


@dataclass(frozen=True)
class BitPlan:
    """What is tried.

    Attributes:
        config: of the run that the bits are for, resolved on the sources alone, with no target.
        sources: the data set without the target (`without_target`).
        candidates: bit-widths.
        brief_steps: steps of each candidate after the start; None for a quarter of those of the run.
        gamma: radius of the flatness; None for a share of the length of the float weights.
        n_directions: random directions of the flatness.
        shift: corruptions (`data.corruptions`) under which candidates are scored, at every severity, on held-out images
            of the sources that they saw; (): scored on all clean images of the source left out.
    """

    config: Config
    sources: DomainDataset
    candidates: tuple[int, ...]
    brief_steps: int | None = None
    gamma: float | None = None
    n_directions: int = 20
    shift: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what could not be tried, before anything is trained.

        Raises:
            ConfigError: no float steps to share, a quantizer without a grid, selection by the
                unseen domain, or a number out of range.
        """
        if self.config.train.selection == "oracle":
            raise ConfigError("train.selection=oracle looks at the unseen domain; choose bits with source or last")
        name = self.config.quantizer.name
        if name in AFTER_TRAINING:
            raise ConfigError(f"quantizer '{name}' works after training; bits are chosen for one that trains, like lsq")
        require_grid(self.config.quantizer)
        if self.start == 0:
            raise ConfigError("candidates share the float steps before quantization: --start-step must be at least 1")
        if self.steps_each < 1 or self.n_directions < 2 or (self.gamma is not None and self.gamma <= 0):
            raise ConfigError("--brief-steps must be at least 1, --num-directions at least 2 and --gamma above 0")

    @property
    def start(self) -> int:
        """Float steps without each domain."""
        return self.config.start_step or 0

    @property
    def steps_each(self) -> int:
        """Quantized steps of each candidate without each domain."""
        whole = self.config.train.steps - self.start
        return max(1, round(BRIEF_FRAC * whole)) if self.brief_steps is None else self.brief_steps

    @property
    def n_steps(self) -> int:
        """All updates together: sources × (start steps + candidates × brief steps)."""
        return len(self.sources.domains) * (self.start + len(self.candidates) * self.steps_each)

    @property
    def key(self) -> str:
        """Return 12 hex digits that name the plan; candidates do not count, so that one can be added later."""
        quantizer = self.config.quantizer.model_copy(update={"bits": MAX_BITS})
        base = config_hash(self.config.model_copy(update={"quantizer": quantizer}))
        text = json.dumps([base, self.steps_each])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def trial_config(self, left_out: str, bits: int) -> Config:
        """Return the configuration of one candidate without one domain, which takes the place of the target.

        It is the beginning of the run that the bits are for, with a constant learning rate.
        """
        brief = {
            "data": {"target": left_out, "test_mode": "target"},
            "quantizer": {"bits": bits, "start_step": self.start},
            "optimizer": {"schedule": "constant", "decay_from": None},
            "train": {"steps": self.start + self.steps_each},
        }
        return build_config([self.config.model_dump(), brief])


def without_target(dataset: DomainDataset, target: str) -> DomainSubset:
    """Return the source domains alone, as if the target did not exist; 'none' makes every domain a source.

    Raises:
        ConfigError: no such target, fewer than two sources are left, or a data set of texts.

    Example:
        >>> from qtdog.data.known_datasets import RotatedDigits
        >>> without_target(RotatedDigits(), "75").domains
        ('0', '15', '30', '45', '60')
    """
    if not isinstance(dataset, ImageDataset):
        text = f"choosing bits leaves out one source domain after another, and {dataset.card.name} has only one"
        raise ConfigError(f"{text}, '{SEEN}': compare trained runs by their held-out texts instead")
    if target != "none" and target not in dataset.domains:
        raise ConfigError(unknown("target domain", target, [*dataset.domains, "none"]))
    kept = [domain for domain in dataset.domains if domain != target]
    if len(kept) < 2:
        raise ConfigError(f"choosing bits needs two source domains or more, found {', '.join(kept) or 'none'}")
    return DomainSubset(dataset, kept)


def place(out: Path, left_out: str, run: str) -> Path:
    """Return the folder of one run below `out`.

    Example:
        >>> place(Path("runs"), "site-a", "7-bit").as_posix(), place(Path("runs"), "site/a", "7-bit").as_posix()
        ('runs/site-a/7-bit', 'runs/site_a-f72eace5335d/7-bit')
    """
    return out / safe_name(left_out) / run
