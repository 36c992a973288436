"""From accuracies on left-out source domains to a number of bits: pure functions, the target is not in sight."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qtdog.core.errors import RunError


@dataclass(frozen=True)
class Trial:
    """One candidate, trained without one source domain.

    Attributes:
        bits: of the candidate.
        left_out: the source domain that it did not see.
        accuracy: on all images of that domain; None if the training failed.
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


def choose(trials: Sequence[Trial]) -> Choice:
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
        >>> table = [Trial(b, d, a, 0.1, 0.0, 1.0, b) for b in scores for d, a in zip("xy", scores[b])]
        >>> choice = choose(table)
        >>> choice.best, choice.bits
        (7, 6)
    """
    table: dict[int, dict[str, Trial]] = {}
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


def _candidate(bits: int, row: Mapping[str, Trial], best: Mapping[str, Trial]) -> Candidate:
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


def _alike(other: Mapping[str, Trial], row: Mapping[str, Trial]) -> dict[str, Trial]:
    """Return another row in the order of this one, so that what is compared is the same domain."""
    return {domain: other[domain] for domain in row}


def _known(row: Mapping[str, Trial]) -> dict[str, float | None]:
    return {domain: trial.accuracy for domain, trial in row.items()}


def _accuracies(row: Mapping[str, Trial]) -> list[float]:
    return [trial.accuracy or 0.0 for trial in row.values()]


def _flatness(row: Mapping[str, Trial]) -> list[float]:
    return [trial.flatness or 0.0 for trial in row.values()]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
