"""Score models on held-out source images and test images, and what they answer, with the rules of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.data.input_cache import InputCache
from qtdog.data.loader import eval_batches
from qtdog.ensemble.calibration import brier_score, expected_calibration_error, fit_temperature
from qtdog.ensemble.model import EnsembleModel
from qtdog.ensemble.uncertainty import Doubt, doubt, risk_coverage
from qtdog.models.backbones import preprocessing
from qtdog.runs.record import Score, merge_scores
from qtdog.training.build import make_accelerator
from qtdog.training.evaluation import EVAL_BATCH
from qtdog.training.load import LoadedModel
from qtdog.training.protocol import DomainProtocol, make_protocol, open_inputs, resolve

KEPT_COVERAGE = 0.9  # of the risk that is reported: the least certain tenth is not answered


@dataclass(frozen=True)
class Answers:
    """Answers on n images.

    Attributes:
        probabilities: softmax of the mean logits at the model's temperature, shape (n, n_classes).
        doubt: of each image; for a single model its mutual information is 0 and its agreement 1.
    """

    probabilities: Tensor
    doubt: Doubt


@dataclass(frozen=True)
class Reliability:
    """How far the probabilities of answers can be trusted, from labelled images.

    Attributes:
        ece: expected calibration error, 15 bins of equal width.
        brier: Brier score, 0 … 2.
        aurc: area under the risk-coverage curve, by entropy.
        risk_at_90: share of wrong answers among the surest 90 %.
    """

    ece: float
    brier: float
    aurc: float
    risk_at_90: float


def temperature_of(model: LoadedModel | EnsembleModel) -> float:
    """Return the temperature of a model's probabilities: 1 for a single model."""
    return model.info.temperature if isinstance(model, EnsembleModel) else 1.0


@torch.no_grad()
def member_logits(model: LoadedModel | EnsembleModel, images: Tensor) -> Tensor:
    """Return the logits (members, n, n_classes) of normalised images (n, C, H, W); one member for a single model."""
    return model.member_logits(images) if isinstance(model, EnsembleModel) else model(images)[None]


def answers(logits: Tensor, temperature: float = 1.0) -> Answers:
    """Return probabilities and doubt of logits (members, n, n_classes).

    Example:
        >>> found = answers(torch.tensor([[[0.0, 0.0]], [[2.0, 2.0]]]))
        >>> found.probabilities.tolist(), round(found.doubt.entropy.item(), 4)
        ([[0.5, 0.5]], 0.6931)
    """
    return Answers((logits.mean(0) / temperature).softmax(-1), doubt(logits, temperature))


def reliability(found: Answers, labels: Tensor) -> Reliability:
    """Return how far answers can be trusted.

    Args:
        found: the answers on n images.
        labels: class indices, shape (n,).

    Raises:
        ConfigError: there are no images.

    Example:
        >>> sure = answers(torch.tensor([[[9.0, 0.0], [0.0, 9.0]]]))
        >>> reliability(sure, torch.tensor([0, 1])).risk_at_90
        0.0
    """
    if not len(labels):
        raise ConfigError("there are no labelled images to compare the probabilities with")
    correct = found.probabilities.argmax(1) == labels
    curve = risk_coverage(found.doubt.entropy.cpu().numpy(), correct.cpu().numpy())
    return Reliability(
        ece=expected_calibration_error(found.probabilities, labels),
        brier=brier_score(found.probabilities, labels),
        aurc=curve.area,
        risk_at_90=curve.risk_at(KEPT_COVERAGE),
    )


def collect(
    model: LoadedModel | EnsembleModel, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the logits (members, n, n_classes) and labels (n,) of all batches, on the CPU.

    Args:
        model: on `device`.
        batches: normalised images and labels.
        device: where to compute.
    """
    parts = [(member_logits(model, images.to(device)).float().cpu(), labels.cpu()) for images, labels in batches]
    return torch.cat([logits for logits, _ in parts], 1), torch.cat([labels for _, labels in parts])


Classifier = Callable[[Tensor], Tensor]
"""Images (n, C, H, W) to logits (k, n, n_classes) of the k models that are scored together."""
Kept = list[tuple[Tensor, Tensor]]
"""Logits (k, n, n_classes) and labels (n,) of each batch, on the CPU."""
Scores = dict[str, list[Score]]
"""By domain, a score for each of the k models."""


@dataclass(frozen=True)
class EvaluationSet:
    """The images of a protocol, and what may be asked of them.

    Attributes:
        config: of a member; it names the target and the splits.
        dataset: the data it names.
        cache: its decoded images.
        protocol: the roles of the images.
        same_splits: whether all members held out the same images.
        device: where to compute.
    """

    config: Config
    dataset: DomainDataset
    cache: InputCache
    protocol: DomainProtocol
    same_splits: bool
    device: torch.device

    @property
    def has_source(self) -> bool:
        """Whether there are source images that no member was trained on; without them the sources say nothing."""
        return self.same_splits and not self.protocol.train_on_heldout

    def source(self, answers: Classifier, kept: Kept | None = None) -> Scores:
        """Return the scores on the held-out part of each source.

        Empty if the members held out different images, or one of them trained on all: then the sources say nothing.

        Args:
            answers: what is scored.
            kept: where to put logits and labels besides.
        """
        if not self.has_source:
            return {}
        return {domain: self._score(answers, part, kept) for domain, part in self.protocol.selection_sets().items()}

    def test(self, answers: Classifier, kept: Kept | None = None) -> tuple[Scores, Scores]:
        """Return the scores on the test images, and on the 80 % of the target that DomainBed's tables report.

        The test images are the whole target, or the third part of each source in the in-domain mode; both are empty
        where there are none, and the second where the members' splits differ.

        Args:
            answers: what is scored.
            kept: where to put logits and labels of the test images besides.
        """
        splits, target = self.protocol.splits, self.protocol.target
        if self.config.data.test_mode == "in-domain":
            domains = self.protocol.sources if self.same_splits else ()
            return {domain: self._score(answers, splits[domain].test, kept) for domain in domains}, {}
        if target is None:
            return {}, {}
        parts = [self._score(answers, part, kept) for part in (splits[target].train, splits[target].heldout)]
        whole = [merge_scores([first, second]) for first, second in zip(*parts, strict=True)]
        return {target: whole}, {target: parts[0]} if self.same_splits else {}

    def _score(self, answers: Classifier, indices: np.ndarray, kept: Kept | None) -> list[Score]:
        mean, std = preprocessing(self.config.model.backbone, channels=self.dataset.card.channels)
        labels = self.dataset.class_index
        batches = eval_batches(self.cache, indices, labels, batch_size=EVAL_BATCH, mean=mean, std=std)
        return score(answers, batches, self.device, kept)


def open_evaluation_set(
    config: Config, dataset: DomainDataset, *, same_splits: bool, progress: Progress = None
) -> EvaluationSet:
    """Return the evaluation set that the configuration of a finished run asks for.

    Raises:
        DataError: the images are not those that the run was trained on, or cannot be read.
    """
    config = resolve(config, dataset, progress)
    data = config.data
    cache = open_inputs(
        dataset, config.model.backbone, image_size=data.image_size, max_tokens=data.max_tokens, progress=progress
    )
    device = make_accelerator(config).device
    return EvaluationSet(config, dataset, cache, make_protocol(config, dataset), same_splits, device)


@torch.no_grad()
def score(
    answers: Classifier, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, kept: Kept | None = None
) -> list[Score]:
    """Return accuracy and mean cross-entropy of each of k models over the same batches, read once.

    Args:
        answers: images to logits (k, n, n_classes).
        batches: images (n, C, H, W) and labels (n,).
        device: where to compute.
        kept: where to put the logits and labels besides.

    Example:
        >>> images, labels = torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.tensor([1, 1])
        >>> found = score(lambda x: torch.stack([x, -x]), [(images, labels)], torch.device("cpu"))
        >>> [one.accuracy for one in found], found[0].n
        ([0.5, 0.5], 2)
    """
    totals: Tensor | None = None
    n = 0
    for images, labels in batches:
        logits = answers(images.to(device)).float()
        if kept is not None:
            kept.append((logits.cpu(), labels.cpu()))
        part = _totals(logits, labels.to(device))
        totals = part if totals is None else totals + part
        n += len(labels)
    assert totals is not None  # make_splits leaves no part of a domain empty
    return [Score(correct / n, loss / n, n) for correct, loss in totals.tolist()]


def _totals(logits: Tensor, labels: Tensor) -> Tensor:
    correct = (logits.argmax(2) == labels).sum(1)
    losses = [functional.cross_entropy(one, labels, reduction="sum") for one in logits]
    return torch.stack([correct.double().cpu(), torch.stack(losses).double().cpu()], 1)


def mean_accuracy(scores: Scores, index: int) -> float | None:
    """Return the accuracy of model `index`, each domain counting once; None without a domain.

    Example:
        >>> mean_accuracy({"a": [Score(0.5, 1.0, 2)], "b": [Score(1.0, 0.0, 8)]}, 0)
        0.75
    """
    return sum(part[index].accuracy for part in scores.values()) / len(scores) if scores else None


def calibrate(source: Kept, test: Kept) -> dict[str, Any]:
    """Return the temperature for an ensemble's probabilities, and their reliability without and with it.

    The temperature is fitted to the held-out images of the sources alone; without any it is 1. The test images are
    measured with it, never fitted to.

    Args:
        source: members' logits (members, n, n_classes) and labels (n,) on held-out source images, batch by batch.
        test: the same on test images.

    Returns:
        `temperature`, and for `source` and `test`, where there are such images, `before` and `after`: each `ece`,
        `brier`, `aurc`, `risk_at_90`.

    Example:
        >>> right = (torch.tensor([[[2.0, 0.0]] * 4]), torch.tensor([0, 0, 0, 1]))
        >>> told = calibrate([right], [])
        >>> round(told["temperature"], 2), sorted(told)
        (1.82, ['source', 'temperature'])
    """
    told: dict[str, Any] = {"temperature": 1.0}
    sets = {name: _joined(kept) for name, kept in (("source", source), ("test", test)) if kept}
    if "source" in sets:
        logits, labels = sets["source"]
        told["temperature"] = fit_temperature(logits.mean(0), labels)
    for name, (logits, labels) in sets.items():
        when = {"before": 1.0, "after": told["temperature"]}
        told[name] = {key: asdict(reliability(answers(logits, t), labels)) for key, t in when.items()}
    return told


def _joined(kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([logits for logits, _ in kept], 1), torch.cat([labels for _, labels in kept])
