"""What one evaluation measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
        selectable: False before quantization began; a quantized run ships only a quantized checkpoint.
        source: score on the held-out part of each source domain.
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
        """Return the record that `to_json` wrote."""
        source, test, test_in = (
            {domain: Score(**score) for domain, score in line[part].items()} for part in ("source", "test", "test_in")
        )
        return cls(SourceRecord(line["step"], line["selectable"], source), test, test_in, line["train_loss"])


def merge_scores(parts: list[Score]) -> Score:
    """Return the score over all images of the parts together.

    Example:
        >>> merge_scores([Score(1.0, 0.0, 1), Score(0.0, 4.0, 3)])
        Score(accuracy=0.25, loss=3.0, n=4)
    """
    n = sum(part.n for part in parts)
    accuracy = sum(part.accuracy * part.n for part in parts) / n
    return Score(accuracy, sum(part.loss * part.n for part in parts) / n, n)
