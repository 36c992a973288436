"""The statistics over runs: mean and standard error, which runs are repetitions of each other, paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95
# with fewer pairs the exact two-sided test cannot reach p < 0.05, whatever the values are: 2 / 2^5 = 0.0625
ENOUGH_PAIRS = 6
MAX_EXACT = 13  # pairs for which all 2^n signs are tried


@dataclass(frozen=True)
class Estimate:
    """Mean and standard error over `n` values.

    Attributes:
        mean: None if nothing was measured.
        error: standard error; None for fewer than two values.
        n: number of values.
    """

    mean: float | None
    error: float | None
    n: int


def estimate(values: Iterable[float | None]) -> Estimate:
    """Return the mean, and its standard error as DomainBed has it: population standard deviation / √n.

    Values that are None are left out. One value says nothing about the spread, so it has no error.

    Source: `format_mean` of DomainBed (Gulrajani and Lopez-Paz, ICLR 2021).

    Example:
        >>> estimate([0.5, 0.7, None])
        Estimate(mean=0.6, error=0.0707..., n=2)
        >>> estimate([])
        Estimate(mean=None, error=None, n=0)
    """
    known = [value for value in values if value is not None]
    n = len(known)
    if n == 0:
        return Estimate(None, None, 0)
    mean = math.fsum(known) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / n)
    return Estimate(mean, spread / math.sqrt(n) if n > 1 else None, n)


class TrialSeed(NamedTuple):
    """One training run behind a model: its data split and its seed."""

    trial: int
    seed: int


@dataclass(frozen=True)
class Replicate:
    """Which repetition of a method a model is: what differs between models of one method and target by chance alone.

    Attributes:
        members: of a run, its own trial and seed; of an ensemble those of all its members, each once, sorted.
        draw: number of the draw in a random search; None outside one.
    """

    members: tuple[TrialSeed, ...]
    draw: int | None = None

    @property
    def trial(self) -> int:
        """The data split; of an ensemble whose members have several, the smallest."""
        return self.members[0].trial

    @property
    def seed(self) -> int:
        """The seed; of an ensemble, the smallest of its first split."""
        return self.members[0].seed

    def single(self) -> list[Replicate]:
        """Return the replicates of the members by themselves."""
        return [Replicate((member,), self.draw) for member in self.members]


def replicate(members: Iterable[tuple[int, int]], draw: int | None = None) -> Replicate:
    """Return the replicate of a model made from runs with these (trial, seed).

    Example:
        >>> replicate([(0, 2), (0, 0), (0, 1)]).members
        (TrialSeed(trial=0, seed=0), TrialSeed(trial=0, seed=1), TrialSeed(trial=0, seed=2))
    """
    return Replicate(tuple(TrialSeed(*one) for one in sorted(set(members))), draw)


class Condition(NamedTuple):
    """Where a value stands: the unseen domain and the repetition."""

    target: str
    replicate: Replicate


def by_target(values: Mapping[Condition, float], targets: Sequence[str]) -> dict[str, Estimate]:
    """Return mean and standard error over the replicates of each unseen domain."""
    return {t: estimate(value for condition, value in values.items() if condition.target == t) for t in targets}


def average_over_targets(values: Mapping[Condition, float], targets: Sequence[str]) -> Estimate:
    """Return the average over unseen domains: the mean of the domains' means, each counting alike.

    So DomainBed has it. The standard error is that of the replicates' own averages, and is given only where every
    replicate has every domain. `n` is the number of replicates; where some lack a domain, that of the domain with the
    fewest.

    Args:
        values: accuracies of one method.
        targets: all domains of the table; a domain without a value leaves the average unknown.

    Source: `print_results_tables` of DomainBed (Gulrajani and Lopez-Paz, ICLR 2021).
    """
    domains = by_target(values, targets)
    means = [one.mean for one in domains.values()]
    known = [mean for mean in means if mean is not None]
    if not known or len(known) < len(means):
        return Estimate(None, None, 0)
    mean = math.fsum(known) / len(known)
    whole = complete(values, targets)
    if any(one.n != len(whole) for one in domains.values()):
        return Estimate(mean, None, min(one.n for one in domains.values()))
    return Estimate(mean, estimate(math.fsum(row) / len(row) for row in whole).error, len(whole))


def complete(values: Mapping[Condition, float], targets: Sequence[str]) -> list[list[float]]:
    """Return the values of each replicate that has every target, in the targets' order."""
    replicates = dict.fromkeys(condition.replicate for condition in values)
    return [
        [values[Condition(target, one)] for target in targets]
        for one in replicates
        if all(Condition(target, one) in values for target in targets)
    ]


@dataclass(frozen=True)
class Pair:
    """Two values that differ in the method alone."""

    condition: Condition
    first: float
    second: float


def pair_up(first: Mapping[Condition, float], second: Mapping[Condition, float]) -> list[Pair]:
    """Return the pairs of two methods, by unseen domain and replicate, in the order of `second`.

    An ensemble that has no partner of just its members is paired with the mean of the other method's runs with the
    trials and seeds of its members, if all of them are there.

    Example:
        >>> runs = {Condition("photo", replicate([(0, seed)])): 0.1 * seed for seed in (1, 2, 3)}
        >>> ensemble = {Condition("photo", replicate([(0, 1), (0, 2)])): 0.5}
        >>> [(round(pair.first, 2), pair.second) for pair in pair_up(runs, ensemble)]
        [(0.15, 0.5)]
    """
    pairs = []
    for condition, value in second.items():
        partner = _partner(condition, first)
        if partner is not None:
            pairs.append(Pair(condition, partner, value))
    for condition, value in first.items():
        if condition not in second and len(condition.replicate.members) > 1:
            partner = _partner(condition, second)
            if partner is not None:
                pairs.append(Pair(condition, value, partner))
    return pairs


def _partner(condition: Condition, others: Mapping[Condition, float]) -> float | None:
    if condition in others:
        return others[condition]
    singles = [others.get(Condition(condition.target, one)) for one in condition.replicate.single()]
    if len(singles) < 2 or None in singles:
        return None
    return math.fsum(value for value in singles if value is not None) / len(singles)


@dataclass(frozen=True)
class Comparison:
    """What pairs say about B minus A; differences as fractions.

    Attributes:
        selection: how checkpoints were selected.
        conditions: unseen domain and replicate of each difference; empty where they are not known.
        differences: accuracy of B minus that of A.
        mean: of the differences.
        low: lower end of the 95 % t interval of the mean difference; None for fewer than two pairs.
        high: upper end.
        p_value: of the two-sided Wilcoxon signed-rank test; None if it says nothing (all are equal).
    """

    selection: str
    conditions: tuple[Condition, ...]
    differences: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    p_value: float | None

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.differences)

    @property
    def warning(self) -> str:
        """What the number of pairs does not allow to say; empty if there are enough.

        Example:
            >>> compare_values([0.1, 0.2], [0.2, 0.3]).warning
            'only 2 pairs: too few to tell. The test cannot give p < 0.05 before 6 pairs (here at best 0.5).'
        """
        if self.n >= ENOUGH_PAIRS:
            return ""
        least = f"{2 / 2**self.n:.3g}"
        number = "only 1 pair" if self.n == 1 else f"only {self.n} pairs"
        limit = f"The test cannot give p < 0.05 before {ENOUGH_PAIRS} pairs (here at best {least})."
        return f"{number}: too few to tell. {limit}"


def compare_values(
    first: Sequence[float], second: Sequence[float], *, selection: str = "", conditions: Sequence[Condition] = ()
) -> Comparison:
    """Return the comparison of paired accuracies.

    The interval is the t interval of the mean difference: d̄ ± t(0.975, n - 1) · s / √n with the sample standard
    deviation s. The test is Wilcoxon's signed-rank test (exact up to 13 pairs, above that `scipy.stats.wilcoxon`). Both
    take pairs for independent, while runs on one domain are alike, so that both say more than they know.

    Args:
        first: accuracies of A.
        second: of B, in the same order.
        selection: how checkpoints were selected.
        conditions: unseen domain and replicate of each pair.

    Raises:
        ValueError: the two are not of one length, or empty.

    Example:
        >>> result = compare_values([0.50, 0.60, 0.70], [0.52, 0.63, 0.71])
        >>> round(result.mean, 3), round(result.low, 4), round(result.high, 4), result.p_value
        (0.02, -0.0048, 0.0448, 0.25)
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} values are no pairs")
    differences = tuple(float(b) - float(a) for a, b in zip(first, second, strict=True))
    low, high = t_interval(differences)
    mean = math.fsum(differences) / len(differences)
    return Comparison(selection, tuple(conditions), differences, mean, low, high, _p_value(differences))


def compare_pairs(pairs: Sequence[Pair], selection: str = "") -> Comparison | None:
    """Return the comparison of what `pair_up` found; None without a pair."""
    if not pairs:
        return None
    first, second = [pair.first for pair in pairs], [pair.second for pair in pairs]
    return compare_values(first, second, selection=selection, conditions=[pair.condition for pair in pairs])


def t_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float | None, float | None]:
    """Return the ends of the t interval of the mean; None for fewer than two values.

    A percentile bootstrap over as few pairs covers too little: 0.75 of the time with 3 of them, 0.85 with 6.

    Source: Student, "The probable error of a mean", Biometrika 1908.
    """
    from scipy import stats

    n = len(differences)
    if n < 2:
        return None, None
    mean = math.fsum(differences) / n
    sample_sd = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (n - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * sample_sd / math.sqrt(n)
    return mean - half, mean + half


def share_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share of n independent answers.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.

    Args:
        share: of right answers, 0 to 1.
        n: answers, at least 1.
        z: quantile of the normal distribution.

    Example:
        >>> [round(bound, 3) for bound in share_interval(0.9, 100)]
        [0.826, 0.945]
    """
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def percent_range(interval: tuple[float, float]) -> str:
    """Return the interval of a share in percent.

    Example:
        >>> percent_range((0.911, 0.9784))
        '91.1 … 97.8'
    """
    return "{:.1f} … {:.1f}".format(*(100 * end for end in interval))


def _p_value(differences: Sequence[float]) -> float | None:
    import numpy as np
    from scipy import stats

    # accuracies are counts over a fixed number of images: what differs by rounding only is equal
    rounded = np.round(np.asarray(differences), 12)
    nonzero = rounded[rounded != 0]
    if not len(nonzero):
        return None
    if len(nonzero) <= MAX_EXACT:
        return signed_rank(nonzero)
    result: Any = stats.wilcoxon(nonzero)
    return float(result.pvalue)


def signed_rank(differences: np.ndarray) -> float:
    """Return the exact two-sided p of Wilcoxon's signed-rank test, also with ties: from all 2^n ways to set the signs.

    `scipy.stats.wilcoxon` gives the same, and takes seconds for a dozen differences with ties.

    Args:
        differences: none of them zero; a handful.

    Example:
        >>> import numpy as np
        >>> signed_rank(np.array([0.2, 0.1, 0.3]))
        0.25
    """
    import numpy as np
    from scipy import stats

    n = len(differences)
    ranks = stats.rankdata(np.abs(differences))
    sums = ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) @ ranks
    observed = ranks[differences > 0].sum()
    return float(min(1.0, 2 * min((sums <= observed + 1e-9).mean(), (sums >= observed - 1e-9).mean())))
