"""Accuracy, calibration and reliability on images of a run or any data set; an old and a new model site by site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, DataError, QtdogError, nearest
from qtdog.core.progress import Progress
from qtdog.data.corruptions import CorruptedCache
from qtdog.data.dataset import DomainDataset
from qtdog.data.decoded_cache import DecodedCache, InputCache
from qtdog.ensemble.prediction import (
    AnyModel,
    Predictions,
    Row,
    Uncertainty,
    collect_logits,
    predict_from_logits,
    predict_images,
    temperature_of,
    unknown_auroc,
)
from qtdog.models.backbones import preprocessing
from qtdog.runs.record import Score, merge_scores
from qtdog.runs.statistics import share_interval
from qtdog.training.build import make_accelerator
from qtdog.training.calibration import LabeledLogits, Reliability, measure_reliability
from qtdog.training.evaluation import EvaluationInputs, class_scores
from qtdog.training.protocol import DomainProtocol, check_reads, make_protocol, open_inputs, resolve


def reliability(found: Predictions, labels: Tensor) -> Reliability:
    """Return how far predictions can be trusted.

    Args:
        found: the predictions for n images.
        labels: class indices, shape (n,).

    Raises:
        ConfigError: there are no images.

    Example:
        >>> sure = predict_from_logits(torch.tensor([[[9.0, 0.0], [0.0, 9.0]]]))
        >>> reliability(sure, torch.tensor([0, 1])).risk_at_90
        0.0
    """
    return measure_reliability(found.probabilities, found.uncertainty.entropy, labels)


LogitsFunction = Callable[[Tensor], Tensor]
"""Normalized images (n, C, H, W) to logits (k, n, n_classes) of the k models that are scored together."""
Scores = dict[str, list[Score]]
"""By domain, a score for each of the k models."""


@dataclass(frozen=True)
class EvaluationSet:
    """The images that a finished run is scored on: held-out images of the sources, and test images.

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

    def source(self, logits_of: LogitsFunction, collected: list[LabeledLogits] | None = None) -> Scores:
        """Return the scores on the validation split of each source.

        Empty if the members held out different images, or one of them trained on all: then the sources say nothing.

        Args:
            logits_of: the models to score.
            collected: logits and labels are appended to it.
        """
        if not self.has_source:
            return {}
        return {
            domain: self._score(logits_of, part, collected) for domain, part in self.protocol.selection_sets().items()
        }

    def test(self, logits_of: LogitsFunction, collected: list[LabeledLogits] | None = None) -> tuple[Scores, Scores]:
        """Return the scores on the test images, and on the 80 % of the target that DomainBed's tables report.

        The test images are the whole target, or the third part of each source in the in-domain mode; both are empty
        where there are none, and the second where the members' splits differ.

        Args:
            logits_of: the models to score.
            collected: logits and labels of the test images are appended to it.
        """
        splits, target = self.protocol.splits, self.protocol.target
        if self.config.data.test_mode == "in-domain":
            domains = self.protocol.sources if self.same_splits else ()
            return {domain: self._score(logits_of, splits[domain].test, collected) for domain in domains}, {}
        if target is None:
            return {}, {}
        parts = [self._score(logits_of, part, collected) for part in (splits[target].train, splits[target].heldout)]
        whole = [merge_scores([first, second]) for first, second in zip(*parts, strict=True)]
        return {target: whole}, {target: parts[0]} if self.same_splits else {}

    def _score(
        self, logits_of: LogitsFunction, indices: np.ndarray, collected: list[LabeledLogits] | None
    ) -> list[Score]:
        mean, std = preprocessing(self.config.model.backbone, channels=self.dataset.card.channels)
        inputs = EvaluationInputs(self.cache, self.dataset.class_index, mean, std)
        return score(logits_of, inputs.batches(indices), self.device, collected)


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
    logits_of: LogitsFunction,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    collected: list[LabeledLogits] | None = None,
) -> list[Score]:
    """Return accuracy and mean cross-entropy of each of k models over the same batches, read once.

    Args:
        logits_of: images to logits (k, n, n_classes).
        batches: images (n, C, H, W) and labels (n,).
        device: where to compute.
        collected: logits and labels are appended to it.

    Example:
        >>> images, labels = torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.tensor([1, 1])
        >>> found = score(lambda x: torch.stack([x, -x]), [(images, labels)], torch.device("cpu"))
        >>> [one.accuracy for one in found], found[0].n
        ([0.5, 0.5], 2)
    """
    totals: Tensor | None = None
    n = 0
    for images, labels in batches:
        logits = logits_of(images.to(device)).float()
        if collected is not None:
            collected.append(LabeledLogits(logits.cpu(), labels.cpu()))
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


def score_domains(
    model: AnyModel,
    dataset: DomainDataset,
    uncertainties: list[Uncertainty] | None = None,
    *,
    progress: Progress = None,
) -> dict[str, dict[str, Any]]:
    """Return how a model does on each domain of any data set; all images are scored, classes are matched by name.

    Returns:
        for each domain `accuracy`, `loss`, `n`, `interval` (95 %, Wilson, of the accuracy), the fields of
        `Reliability`, and `classes`, as `class_scores` gives them.

    Args:
        model: one model or an ensemble.
        dataset: the images.
        uncertainties: those of each domain's images are appended to it.
        progress: of decoding images.

    Raises:
        ConfigError: the data set is of texts and the model takes images, or the other way round.
        DataError: the data set has a class that the model does not know, other channels, or an unreadable image.
    """
    model_input = model.info.preprocessing
    cache, labels = open_for(model, dataset, progress)
    device = Accelerator().device
    model = model.to(device)
    scores = {}
    for domain in dataset.domains:
        batches = EvaluationInputs(cache, labels, model_input.mean, model_input.std).batches(dataset.indices(domain))
        images = collect_logits(model, batches, device)
        predictions = predict_from_logits(images.logits, temperature_of(model))
        if uncertainties is not None:
            uncertainties.append(predictions.uncertainty)
        mean = images.logits.mean(0)
        right = (mean.argmax(1) == images.labels).double().mean().item()
        loss = functional.cross_entropy(mean, images.labels).item()
        scores[domain] = {"accuracy": right, "loss": loss, "n": len(images.labels)}
        scores[domain] |= asdict(reliability(predictions, images.labels))
        scores[domain]["interval"] = share_interval(right, len(images.labels))
        scores[domain]["classes"] = class_scores(mean.argmax(1), images.labels, model.info.classes)
    return scores


def open_for(model: AnyModel, dataset: DomainDataset, progress: Progress) -> tuple[InputCache, np.ndarray]:
    """Return the inputs of a data set as `model` takes them, and the model's class index of each.

    Raises:
        ConfigError, DataError: as in `score_domains`.
    """
    model_input = model.info.preprocessing
    check_reads(model.info.backbone, dataset)
    if dataset.card.channels != model_input.channels:
        channels = dataset.card.channels
        raise DataError(
            f"the model takes images of {model_input.channels} channels, {dataset.card.name} has {channels}"
        )
    labels = model_labels(model.info.classes, dataset)
    sizes = {"image_size": model_input.image_size, "max_tokens": model_input.max_tokens}
    return open_inputs(dataset, model.info.backbone, **sizes, words=model_input.vocabulary, progress=progress), labels


def score_corruptions(
    model: AnyModel,
    dataset: DomainDataset,
    corruptions: Sequence[str],
    severities: Sequence[int],
    *,
    seed: int = 0,
    progress: Progress = None,
) -> list[dict[str, Any]]:
    """Return the accuracy of a model on every domain under every corruption and severity.

    Args:
        model: one model or an ensemble.
        dataset: images; all are scored, classes are matched by name.
        corruptions: names of `data.corruptions.CORRUPTIONS`.
        severities: each of 1 to 5.
        seed: of the corruptions' random draws; two models scored with one seed see the same pixels.
        progress: of the (corruption, severity, domain) combinations.

    Returns:
        a row `{corruption, severity, domain, accuracy, n}` for each combination.

    Raises:
        ConfigError: the data set is of texts; an unknown corruption or severity.
        DataError: as in `score_domains`.
    """
    model_input = model.info.preprocessing
    cache, labels = open_for(model, dataset, None)
    if not isinstance(cache, DecodedCache):
        raise ConfigError("--corrupt is for images; this data set is of texts")
    device = Accelerator().device
    model = model.to(device)
    combinations = [(name, level, domain) for name in corruptions for level in severities for domain in dataset.domains]
    rows = []
    for done, (name, level, domain) in enumerate(combinations, start=1):
        view = CorruptedCache(cache, name, level, seed)
        batches = EvaluationInputs(view, labels, model_input.mean, model_input.std).batches(dataset.indices(domain))
        images = collect_logits(model, batches, device)
        right = (images.logits.mean(0).argmax(1) == images.labels).double().mean().item()
        rows.append(
            {"corruption": name, "severity": level, "domain": domain, "accuracy": right, "n": len(images.labels)}
        )
        if progress is not None:
            progress(done, len(combinations))
    return rows


def model_labels(classes: tuple[str, ...], dataset: DomainDataset) -> np.ndarray:
    """Return the model's class index of each image, matching classes by name.

    Raises:
        DataError: the data set has a class that the model does not know.
    """
    unknown = [name for name in dataset.classes if name not in classes]
    if unknown:
        close = nearest(unknown[0], classes)
        hint = f" (did you mean '{close}'?)" if close else ""
        text = f"the model does not know class '{unknown[0]}'{hint}; it knows {', '.join(classes)}."
        raise DataError(f"{text} Rename or remove that folder.")
    mapping = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)
    return mapping[dataset.class_index]


def unknown_auroc_of(
    model: AnyModel, known: Sequence[Uncertainty], files: Sequence[Path], *, skip_unreadable: bool = False
) -> tuple[dict[str, float], list[QtdogError]]:
    """Return how well uncertainty separates images of unknown kinds from known ones: AUROC of each measure.

    Args:
        model: the model.
        known: uncertainty of images of the classes that it knows.
        files: the other images.
        skip_unreadable: leave out files that cannot be read, as long as one can.

    Returns:
        The areas, and the errors of the files that were left out.

    Raises:
        DataError: one of the files cannot be read.
    """
    rows: list[Row] = []
    errors: list[QtdogError] = []
    for row in predict_images(model, files):
        if isinstance(row, QtdogError):
            errors.append(row)
        else:
            rows.append(row)
    if errors and not (skip_unreadable and rows):
        raise errors[0]
    found = {}
    for name in ("entropy", "mutual_information"):
        if name in rows[0]:
            values = torch.cat([getattr(part, name) for part in known])
            found[f"unknown_auroc_{name}"] = unknown_auroc(values.numpy(), [row[name] for row in rows])
    return found, errors


LEVEL = 0.05  # of the test that calls a site worse


@dataclass(frozen=True)
class SiteComparison:
    """Two models on the images of one domain (a site, a camera, a hospital).

    Attributes:
        domain: its name.
        n: images.
        n_old: answered right by the old model.
        n_new: by the new one.
        n_won: wrong before and right now.
        n_lost: right before and wrong now.
    """

    domain: str
    n: int
    n_old: int
    n_new: int
    n_won: int
    n_lost: int

    @property
    def difference(self) -> float:
        """Accuracy of the new model minus that of the old one, as a fraction."""
        return (self.n_won - self.n_lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference.

        Source: Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
        Medicine 2005: half an image is added to each of the four cells, then the normal interval of paired shares.

        Example:
            >>> low, high = SiteComparison("c", n=100, n_old=80, n_new=86, n_won=8, n_lost=2).interval
            >>> round(low, 3), round(high, 3)
            (-0.004, 0.122)
        """
        n, won, lost = self.n + 2, self.n_won + 0.5, self.n_lost + 0.5
        middle = (won - lost) / n
        half = 1.96 * math.sqrt((won + lost) - (won - lost) ** 2 / n) / n
        return max(-1.0, middle - half), min(1.0, middle + half)

    @property
    def p_value(self) -> float:
        """Two-sided p of the exact McNemar test: are images lost as often as won? 1 if no answer changed.

        Source: McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.

        Example:
            >>> SiteComparison("c", n=100, n_old=80, n_new=86, n_won=8, n_lost=2).p_value
            0.109375
        """
        changed, fewer = self.n_won + self.n_lost, min(self.n_won, self.n_lost)
        tail = math.fsum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed
        return min(1.0, 2 * tail)

    @property
    def verdict(self) -> str:
        """`worse` or `better` where chance alone does not explain it (p < 0.05), else `no difference shown`."""
        if self.p_value >= LEVEL:
            return "no difference shown"
        return "worse" if self.n_lost > self.n_won else "better"


def compare_sites(
    old: AnyModel, new: AnyModel, dataset: DomainDataset, *, progress: Progress = None
) -> list[SiteComparison]:
    """Return how two models do on every domain of a data set; all images are scored, classes are matched by name.

    The models may differ in everything: backbone, image size, number of members, and in classes that the data set
    does not have.

    Args:
        old: one model or an ensemble.
        new: the one that may replace it.
        dataset: images of old and new sites.
        progress: of decoding images.

    Raises:
        ConfigError: one takes texts and the data set is of images, or the other way round; no image at all.
        DataError: the data set has a class that one of them does not know, other channels, or an unreadable image.
    """
    right = [_right(model, dataset, progress) for model in (old, new)]
    sites = []
    for domain in dataset.domains:
        indices = dataset.indices(domain)
        if not len(indices):
            raise ConfigError(f"domain '{domain}' has no image")
        before, after = (answers[indices] for answers in right)
        counts = (before.sum(), after.sum(), (~before & after).sum(), (before & ~after).sum())
        sites.append(SiteComparison(domain, len(indices), *map(int, counts)))
    return sites


def _right(model: AnyModel, dataset: DomainDataset, progress: Progress) -> npt.NDArray[np.bool_]:
    """Return whether the model answers each image of the data set right."""
    cache, labels = open_for(model, dataset, progress)
    device = Accelerator().device
    how = model.info.preprocessing
    batches = EvaluationInputs(cache, labels, how.mean, how.std).batches(np.arange(len(dataset)))
    images = collect_logits(model.to(device), batches, device)
    return (images.logits.mean(0).argmax(1) == images.labels).numpy()


def worse_sites(sites: Sequence[SiteComparison]) -> list[str]:
    """Return the domains at which the new model is worse than the old one, beyond chance."""
    return [site.domain for site in sites if site.verdict == "worse"]
