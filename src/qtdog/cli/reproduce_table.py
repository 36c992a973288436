"""Our numbers beside those of a table of the paper."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtdog.core.paper import MEASURES, PaperRow

NOT_OURS = ("mean_of_five",)  # measures that no single data set can give
HEADERS = ["method", "measured on", "paper", "ours", "difference", "from"]


@dataclass(frozen=True)
class Line:
    """One number of the paper, and ours.

    Attributes:
        method: as the paper calls it.
        measure: a name in `core.paper.MEASURES`, perhaps with "/" and a domain.
        paper: accuracy there, %.
        ours: mean over the trials that are complete, %; None if there is none yet.
        error: standard error of that mean; None below two trials.
        told: how many runs there are, or why there is none.
        note: what else differs.
    """

    method: str
    measure: str
    paper: float
    ours: float | None
    error: float | None
    told: str
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, in points; None where they are not the same kind of number."""
        return None if self.ours is None or self.measure in NOT_OURS else self.ours - self.paper

    def cells(self) -> list[str]:
        """Return the line as cells of a table with `HEADERS`."""
        name, _, domain = self.measure.partition("/")
        ours = "–" if self.ours is None else f"{self.ours:.1f}" + (f" ± {self.error:.1f}" if self.error else "")
        difference = "–" if self.difference is None else f"{self.difference:+.1f}"
        return [self.method, domain or MEASURES[name], f"{self.paper:.1f}", ours, difference, self.told]


def lines_of(row: PaperRow, trials: Sequence[Mapping[str, dict[str, Any]]], n_targets: int) -> list[Line]:
    """Return the lines of a row.

    Args:
        row: of the paper.
        trials: for each trial the results by target, as far as there are any; an ensemble is one trial.
        n_targets: how many targets a complete trial has.
    """
    lines = []
    for measure, paper in row.values.items():
        name, _, domain = measure.partition("/")
        needed = 1 if domain else n_targets
        found = [[result for target, result in trial.items() if domain in ("", target)] for trial in trials]
        whole = [statistics.fmean(value_of(one, name) for one in trial) for trial in found if len(trial) == needed]
        ours = 100 * statistics.fmean(whole) if whole else None
        error = 100 * statistics.stdev(whole) / math.sqrt(len(whole)) if len(whole) > 1 else None
        lines.append(Line(row.method, measure, paper, ours, error, row.missing or _told(row, found, needed), row.note))
    return lines


def _told(row: PaperRow, found: Sequence[Sequence[Any]], needed: int) -> str:
    n_runs, n_wanted = sum(map(len, found)), needed * max(len(found), 1)
    what = "runs" if row.members == 1 else f"ensembles of {row.members}"
    return f"{n_runs} of {n_wanted} {what}"


def value_of(result: Mapping[str, Any], measure: str) -> float:
    """Return what a result says of a measure, as a share.

    Of a single run `unseen` is the accuracy on the 80 % of the unseen domain that DomainBed's protocol trains on when
    it is a source, as single models are published; of an ensemble it is that on the whole domain.

    Example:
        >>> value_of({"test_accuracy": 0.5, "test_accuracy_80": {"sketch": 0.25}}, "unseen")
        0.25
    """
    if measure == "source":
        return result["source_accuracy"]
    if measure.startswith("percentile_10"):
        return result["groups"][measure.removeprefix("percentile_10_")]["percentile_10"]
    part = result.get("test_accuracy_80")
    if measure in ("unseen", *NOT_OURS) and part and "members" not in result:
        return next(iter(part.values()))
    return result["test_accuracy"]
