"""Evaluation: accuracy and loss over images, one evaluation of a run, accuracy over groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from qtdog.core.errors import ConfigError, DataError
from qtdog.data.input_cache import InputCache
from qtdog.data.loader import eval_batches
from qtdog.data.text import TextDomains
from qtdog.models.network import Network
from qtdog.runs.record import Record, Score, SourceRecord, merge_scores
from qtdog.training.components import Components
from qtdog.training.protocol import DomainProtocol


@dataclass(frozen=True)
class GroupAccuracy:
    """How right a model is, over samples and over groups of them.

    Attributes:
        average: share of all samples.
        percentile_10: the 10th percentile of the groups' own shares, interpolated linearly.
        worst: the smallest of them.
        n_groups: groups that have a sample.
    """

    average: float
    percentile_10: float
    worst: float
    n_groups: int


def group_accuracy(
    correct: npt.NDArray[np.bool_], groups: npt.NDArray[np.integer], percentile: float = 10.0
) -> GroupAccuracy:
    """Return accuracies over the groups that have a sample; each of them counts alike in the percentile.

    Source: WILDS Amazon (Koh et al., ICML 2021), whose metric is the 10th percentile over reviewers.

    Args:
        correct: whether each sample was answered right (n,).
        groups: group of each, a small integer (n,).
        percentile: which one is given as `percentile_10`.

    Raises:
        DataError: there is no sample, or the two differ in length.

    Example:
        >>> group_accuracy(np.array([True, True, False, True]), np.array([0, 0, 1, 1])).percentile_10
        0.55
    """
    if len(correct) == 0 or len(correct) != len(groups):
        raise DataError(f"accuracy over groups needs as many groups as answers, found {len(groups)} and {len(correct)}")
    total = np.bincount(groups)
    right = np.bincount(groups, weights=correct.astype(np.float64))
    own = right[total > 0] / total[total > 0]
    return GroupAccuracy(float(np.mean(correct)), float(np.percentile(own, percentile)), float(own.min()), len(own))


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    accelerator: Accelerator,
    *,
    check: Callable[[], None] = lambda: None,
) -> Score:
    """Return accuracy and mean cross-entropy over `batches`, in float32 and evaluation mode.

    Several processes each bring their own part of the images; the score is over all of them. Autocast is never used:
    what is measured here is what the shipped file gives.

    Args:
        network: images (n, C, H, W) → logits (n, n_classes); its mode is put back afterwards.
        batches: images and labels (n,), on any device.
        accelerator: where to compute, and with whom to add up.
        check: called before each batch; may raise to break off.
    """
    was_training = network.training
    network.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    try:
        # Quantize each weight once per evaluation, not once per batch.
        with parametrize.cached():
            for images, labels in batches:
                check()
                totals += _batch_totals(network, images.to(accelerator.device), labels.to(accelerator.device))
    finally:
        network.train(was_training)
    correct, loss, n = _sum_over_processes(totals, accelerator)
    return Score(correct / n, loss / n, int(n))


def _batch_totals(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits = network(images)
    correct = (logits.argmax(1) == labels).sum()
    loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
    return torch.tensor([correct.item(), loss.item(), len(labels)], dtype=torch.float64)


def _sum_over_processes(totals: Tensor, accelerator: Accelerator) -> list[float]:
    if accelerator.num_processes == 1:
        return totals.tolist()
    summed = accelerator.reduce(totals.to(accelerator.device), reduction="sum")
    assert isinstance(summed, Tensor)
    return summed.tolist()


EVAL_BATCH = 128


@dataclass(frozen=True)
class Evaluator:
    """Measures a network on the images of a protocol.

    Attributes:
        network: evaluated in place.
        accelerator: device and processes.
        cache, class_index: images and labels of the data set.
        protocol: the roles of the images.
        test_mode: `target` or `in-domain`.
        mean, std: of the input, per channel.
    """

    network: Network
    accelerator: Accelerator
    cache: InputCache
    class_index: np.ndarray
    protocol: DomainProtocol
    test_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, step: int, selectable: bool, train_loss: float | None, check: Callable[[], None]) -> Record:
        """Return the record of this moment."""
        source = {domain: self.score(part, check) for domain, part in self.protocol.selection_sets().items()}
        test, test_in = self._test_scores(check)
        return Record(SourceRecord(step, selectable, source), test, test_in, train_loss)

    def _test_scores(self, check: Callable[[], None]) -> tuple[dict[str, Score], dict[str, Score]]:
        splits, target = self.protocol.splits, self.protocol.target
        if self.test_mode == "in-domain":
            return {domain: self.score(splits[domain].test, check) for domain in self.protocol.sources}, {}
        if target is None:
            return {}, {}
        parts = [self.score(part, check) for part in (splits[target].train, splits[target].heldout)]
        return {target: merge_scores(parts)}, {target: parts[0]}

    def score(self, indices: np.ndarray, check: Callable[[], None] = lambda: None) -> Score:
        """Return accuracy and loss over the images at `indices`, shared among the processes."""
        accelerator = self.accelerator
        if len(indices) < accelerator.num_processes:
            raise ConfigError(f"{len(indices)} images cannot be shared among {accelerator.num_processes} processes")
        mine = indices[accelerator.process_index :: accelerator.num_processes]
        batches = eval_batches(self.cache, mine, self.class_index, batch_size=EVAL_BATCH, mean=self.mean, std=self.std)
        # A signal reaches the processes at different batches; among several, only the loop asks, between two steps.
        alone = accelerator.num_processes == 1
        return evaluate(self.network, batches, accelerator, check=check if alone else lambda: None)


def group_scores(parts: Components, protocol: DomainProtocol, dataset: object) -> dict[str, Any]:
    """Return `{"groups": {"in": …, "out": …}}`, each a `training.evaluation.GroupAccuracy`; {} without groups.

    "in" are texts of the sources that were neither trained nor selected on (the official id_test), "out" all of the
    unseen domain. Source: Koh et al., *WILDS* (ICML 2021), Amazon.

    Args:
        parts: with the network that ships.
        protocol: roles of domains and texts.
        dataset: the data set.
    """
    if not isinstance(dataset, TextDomains):
        return {}
    sets = {"in": np.concatenate([protocol.splits[domain].test for domain in protocol.sources])}
    if protocol.target is not None:
        sets["out"] = protocol.splits[protocol.target].everything
    scores = {
        name: asdict(group_accuracy(_correct(parts, indices), dataset.group_index[indices]))
        for name, indices in sets.items()
        if len(indices)
    }
    return {"groups": scores}


@torch.no_grad()
def _correct(parts: Components, indices: np.ndarray) -> np.ndarray:
    """Return whether each text is answered right, bool (n,), in evaluation mode."""
    how = parts.batches
    batches = eval_batches(how.cache, indices, how.class_index, batch_size=EVAL_BATCH, mean=how.mean, std=how.std)
    right = []
    with parametrize.cached():
        for tokens, labels in batches:
            logits = parts.network(tokens.to(parts.accelerator.device))
            right.append((logits.argmax(1).cpu() == labels).numpy())
    return np.concatenate(right)
