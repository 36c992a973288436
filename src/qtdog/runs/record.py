"""What one evaluation measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


@dataclass(frozen=True)
class Score:
    """Accuracy and mean cross-entropy over `n` images."""

    accuracy: float
    loss: float
    n: int


@dataclass(frozen=True)
class SourceRecord:
    """One evaluation as selection may see it: the target is not in it.

    Attributes:
        step: updates made before the evaluation.
        selectable: False before quantization began; a quantized run saves only a quantized checkpoint.
        source: score on the validation split of each source domain.
    """

    step: int
    selectable: bool
    source: dict[str, Score]

    @property
    def source_accuracy(self) -> float:
        """Mean over the source domains, each counting once whatever its size (DomainBed)."""
        return sum(score.accuracy for score in self.source.values()) / len(self.source)

    @property
    def source_loss(self) -> float:
        """Mean cross-entropy over the source domains, each counting once."""
        return sum(score.loss for score in self.source.values()) / len(self.source)


@dataclass(frozen=True)
class Record:
    """One evaluation, whole; a line of `metrics.jsonl`.

    Attributes:
        seen: what selection may see.
        test: score on images that are neither trained on nor selected on, by domain: the whole target domain, or the
            third part of each source in the in-domain mode. Empty when trained on everything.
        test_in: the same on the 80 % split of the target that DomainBed's tables report.
        train_loss: mean training loss since the evaluation before; None if there was no step between.
    """

    seen: SourceRecord
    test: dict[str, Score]
    test_in: dict[str, Score]
    train_loss: float | None

    @property
    def test_accuracy(self) -> float | None:
        """Mean over the test domains, or None if there are none."""
        return sum(score.accuracy for score in self.test.values()) / len(self.test) if self.test else None

    def to_json(self) -> dict[str, Any]:
        """Return the line's content."""
        both = {"test": self.test, "test_in": self.test_in}
        seen = asdict(self.seen) | {"source_accuracy": self.seen.source_accuracy}
        scores = {name: {domain: asdict(score) for domain, score in part.items()} for name, part in both.items()}
        return seen | scores | {"test_accuracy": self.test_accuracy, "train_loss": self.train_loss}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Record:
        """Return the record that `to_json` wrote.

        Raises:
            ValueError: it is another one; the text names the first field.
        """
        if not isinstance(line, Mapping):
            raise ValueError("it is no object")
        source, test, test_in = (_scores(line, part) for part in ("source", "test", "test_in"))
        if not source:
            raise ValueError("'source' names no domain")
        if not isinstance(line.get("selectable"), bool):
            raise ValueError("'selectable' is neither true nor false")
        loss = checked_number(line, "train_loss", optional=True)
        step = int(checked_number(line, "step", low=0, whole=True) or 0)
        return cls(SourceRecord(step, line["selectable"], source), test, test_in, loss)


def _scores(line: Mapping[str, Any], part: str) -> dict[str, Score]:
    found = line.get(part)
    if not isinstance(found, Mapping):
        raise ValueError(f"'{part}' does not map domains to scores")
    scores = {}
    for domain, score in found.items():
        if not isinstance(score, Mapping) or set(score) != {"accuracy", "loss", "n"}:
            raise ValueError(f"'{part}' does not map domains to accuracy, loss and n")
        accuracy = checked_number(score, "accuracy", low=0, high=1)
        loss = checked_number(score, "loss")
        scores[domain] = Score(accuracy or 0.0, loss or 0.0, int(checked_number(score, "n", low=0, whole=True) or 0))
    return scores


def checked_number(
    values: Mapping[str, Any],
    key: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    whole: bool = False,
    optional: bool = False,
) -> Any:
    """Return the number that some read values have under a key, None if it is optional and missing or null.

    Raises:
        ValueError: it is none, or out of range; NaN counts as a number where no range is asked for.
    """
    value: Any = values.get(key)
    if value is None and optional:
        return None
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    bounded = low > -math.inf or high < math.inf
    if (
        value is None
        or not number
        or (bounded and not low <= value <= high)
        or (isinstance(value, int) and abs(value) > MAX_COUNT)
    ):
        what = "whole number" if whole else "number"
        raise ValueError(f"'{key}' is no {what} that a run writes: {str(value)[:40]!r}")
    return value


MAX_COUNT = 10**15
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Amount = Annotated[float, Field(ge=0, le=MAX_COUNT)]
_Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Member(_Fields):
    folder: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
    trial: _Count
    seed: _Count


class _Result(_Fields):
    """What tables and reports read of a `result.json`, of the types that a run or ensemble writes."""

    selection: str
    test_mode: str
    target_domain: str | None = None
    dataset: str | None = None
    model_sha256: str | None = None
    kind: str | None = None
    source_accuracy: _Fraction | None = None
    test_accuracy: _Fraction | None = None
    test_accuracy_80: dict[str, _Fraction] = {}
    selected_step: _Count | None = None
    forked_from_step: _Count | None = None
    training_steps: _Count | None = None
    inference_passes: _Amount | None = None
    training_runs: _Amount | None = None
    trained_s: _Amount | None = None
    size: dict[str, float | None]
    environment: dict[str, Any] = {}
    members: list[_Member] = []


class _DomainScore(_Fields):
    accuracy: _Fraction
    n: _Count


class _ClassScore(_Fields):
    n: _Count
    right: _Count


class _Acceptance(_Fields):
    coverage: float
    error: float


class _Answers(_Fields):
    accept: _Acceptance | None = None


class _Calibration(_Fields):
    accept_threshold: float | None = None
    source: _Answers = _Answers()
    test: _Answers = _Answers()


class _Float(_Fields):
    source_accuracy: _Fraction | None
    test_accuracy: _Fraction | None


class _AfterTraining(_Fields):
    float: _Float


class _ShownResult(_Result):
    """What the end of a training shows besides, also of one that was finished before."""

    scores: dict[str, dict[str, _DomainScore]] = {}
    classes: dict[str, dict[str, list[_ClassScore]]] = {}
    calibration: _Calibration = _Calibration()
    after_training: _AfterTraining | None = None


def check_result(result: Mapping[str, Any], *, shown: bool = False) -> None:
    """Raise ValueError unless what is read of a `result.json` is of the types that a run writes.

    Args:
        result: its content.
        shown: check what the end of a training shows too, not only what tables and reports read.
    """
    try:
        (_ShownResult if shown else _Result).model_validate(result)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"'{where}': {first['msg']} (found {str(first['input'])[:40]!r})") from error
    for key in ("bytes", "ratio"):
        checked_number(result["size"], key, low=0, whole=key == "bytes")


def merge_scores(parts: list[Score]) -> Score:
    """Return the score over all images of the parts together.

    Example:
        >>> merge_scores([Score(1.0, 0.0, 1), Score(0.0, 4.0, 3)])
        Score(accuracy=0.25, loss=3.0, n=4)
    """
    n = sum(part.n for part in parts)
    accuracy = sum(part.accuracy * part.n for part in parts) / n
    return Score(accuracy, sum(part.loss * part.n for part in parts) / n, n)
