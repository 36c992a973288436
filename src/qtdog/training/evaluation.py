"""Evaluation: accuracy and loss over images, one evaluation of a run, groups; batch norm that fits the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from qtdog.core.errors import ConfigError, DataError
from qtdog.data.augment import CPU
from qtdog.data.decoded_cache import InputCache
from qtdog.data.loader import Indices, eval_batches
from qtdog.data.text import TextDomains
from qtdog.models.network import Network
from qtdog.runs.record import Record, Score, SourceRecord, merge_scores
from qtdog.training.protocol import DomainProtocol

if TYPE_CHECKING:  # components hold an `Evaluator`
    from qtdog.training.components import Components


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


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Hold a network in evaluation mode and compute each quantized weight once in the block, not once per batch."""
    was_training = network.training
    if any(module.training for module in network.modules()):
        network.eval()
    try:
        with parametrize.cached():
            yield
    finally:
        if was_training:
            network.train()


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    accelerator: Accelerator,
    *,
    check_interrupt: Callable[[], None] = lambda: None,
) -> Score:
    """Return accuracy and mean cross-entropy over `batches`, in float32 and evaluation mode.

    Several processes each bring their own part of the images; the score is over all of them. Autocast is never used:
    what is measured here is what the saved file gives.

    Args:
        network: images (n, C, H, W) → logits (n, n_classes); its mode is put back afterwards.
        batches: images and labels (n,), on any device.
        accelerator: where to compute, and with whom to add up.
        check_interrupt: called before each batch; may raise to break off.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    n_images = 0
    with evaluating(network):
        for images, labels in batches:
            check_interrupt()
            parts.append(_correct_and_loss(network, images.to(accelerator.device), labels.to(accelerator.device)))
            n_images += len(labels)
    # read once, at the end: each reading waits for the device
    sums = [sum(values.tolist()) for values in map(torch.stack, zip(*parts, strict=True))] or [0.0, 0.0]
    correct, loss, n = _sum_over_processes(torch.tensor([*sums, n_images], dtype=torch.float64), accelerator)
    return Score(correct / n, loss / n, int(n))


def _correct_and_loss(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = network(images)
    correct = (logits.argmax(1) == labels).sum()
    return correct, functional.cross_entropy(logits.float(), labels, reduction="sum")


def _sum_over_processes(totals: Tensor, accelerator: Accelerator) -> list[float]:
    if accelerator.num_processes == 1:
        return totals.tolist()
    summed = accelerator.reduce(totals.to(accelerator.device), reduction="sum")
    assert isinstance(summed, Tensor)
    return summed.tolist()


EVAL_BATCH = 128


@dataclass(frozen=True)
class EvaluationInputs:
    """The images (or texts) of a data set as a network takes them in evaluation: not augmented.

    Attributes:
        cache: of the data set.
        class_index: class of each image (n,).
        mean, std: of the input, per channel.
    """

    cache: InputCache
    class_index: npt.NDArray[np.integer]
    mean: Sequence[float]
    std: Sequence[float]

    def batches(
        self, indices: Indices, batch_size: int = EVAL_BATCH, device: torch.device = CPU
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (b, C, H, W) and labels (b,) of the images at `indices`, in their order, on a device."""
        options = {"batch_size": batch_size, "mean": self.mean, "std": self.std, "device": device}
        return eval_batches(self.cache, indices, self.class_index, **options)


@dataclass(frozen=True)
class Evaluator:
    """Measures a network on the images of a protocol.

    Attributes:
        network: evaluated in place.
        accelerator: device and processes.
        inputs: of the data set.
        protocol: the roles of the images.
        test_mode: `target` or `in-domain`.
    """

    network: Network
    accelerator: Accelerator
    inputs: EvaluationInputs
    protocol: DomainProtocol
    test_mode: str

    def __call__(
        self, step: int, selectable: bool, train_loss: float | None, check_interrupt: Callable[[], None] = lambda: None
    ) -> Record:
        """Return the record of this moment."""
        with evaluating(self.network):
            parts = self.protocol.selection_sets()
            source = {domain: self.score(part, check_interrupt) for domain, part in parts.items()}
            test, test_in = self._test_scores(check_interrupt)
        return Record(SourceRecord(step, selectable, source), test, test_in, train_loss)

    def _test_scores(self, check_interrupt: Callable[[], None]) -> tuple[dict[str, Score], dict[str, Score]]:
        splits, target = self.protocol.splits, self.protocol.target
        if self.test_mode == "in-domain":
            return {domain: self.score(splits[domain].test, check_interrupt) for domain in self.protocol.sources}, {}
        if target is None:
            return {}, {}
        parts = [self.score(part, check_interrupt) for part in (splits[target].train, splits[target].heldout)]
        return {target: merge_scores(parts)}, {target: parts[0]}

    def score(self, indices: np.ndarray, check_interrupt: Callable[[], None] = lambda: None) -> Score:
        """Return accuracy and loss over the images at `indices`, shared among the processes."""
        accelerator = self.accelerator
        if len(indices) < accelerator.num_processes:
            raise ConfigError(f"{len(indices)} images cannot be shared among {accelerator.num_processes} processes")
        mine = indices[accelerator.process_index :: accelerator.num_processes]
        batches = self.inputs.batches(mine, device=accelerator.device)
        if accelerator.num_processes > 1:
            # A signal reaches the processes at different batches; they are asked together, between two steps.
            return evaluate(self.network, batches, accelerator)
        return evaluate(self.network, batches, accelerator, check_interrupt=check_interrupt)


def group_scores(components: Components) -> dict[str, Any]:
    """Return `{"groups": {"in": …, "out": …}}`, each a `training.evaluation.GroupAccuracy`; {} without groups.

    "in" are texts of the sources that were neither trained nor selected on (the official id_test), "out" all of the
    unseen domain. Source: Koh et al., *WILDS* (ICML 2021), Amazon.

    Args:
        components: with the network that is saved.
    """
    dataset, protocol = components.dataset, components.protocol
    if not isinstance(dataset, TextDomains):
        return {}
    sets = {"in": np.concatenate([protocol.splits[domain].test for domain in protocol.sources])}
    if protocol.target is not None:
        sets["out"] = protocol.splits[protocol.target].everything
    scores = {
        name: asdict(group_accuracy(_correct(components, indices), dataset.group_index[indices]))
        for name, indices in sets.items()
        if len(indices)
    }
    return {"groups": scores}


@torch.no_grad()
def _correct(components: Components, indices: np.ndarray) -> np.ndarray:
    """Return whether each text is answered right, bool (n,), in evaluation mode."""
    right = []
    with parametrize.cached():
        for tokens, labels in components.inputs.batches(indices):
            logits = components.network(tokens.to(components.accelerator.device))
            right.append((logits.argmax(1).cpu() == labels).numpy())
    return np.concatenate(right)


def class_scores(answers: Tensor, labels: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return how the images of each class that occurs were answered.

    Args:
        answers: class indices, shape (n,).
        labels: class indices, shape (n,).
        classes: names of all classes, in the order of the indices.

    Returns:
        a dictionary for each class, in their order: `class`, `n` images, `right` answers, and `called`: the other
        classes that they were taken for, with how often, most often first.

    Example:
        >>> class_scores(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), ["cat", "dog"])
        [{'class': 'cat', 'n': 2, 'right': 1, 'called': {'dog': 1}}, {'class': 'dog', 'n': 1, 'right': 1, 'called': {}}]
    """
    # only the pairs that occur: a table of 10,000 classes would have 10^8 cells
    cells, counts = torch.unique(labels * len(classes) + answers, return_counts=True)
    found: dict[int, dict[str, Any]] = {}
    for cell, count in sorted(zip(cells.tolist(), counts.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0])):
        label, answer = divmod(cell, len(classes))
        row = found.setdefault(label, {"class": classes[label], "n": 0, "right": 0, "called": {}})
        row["n"] += count
        if answer == label:
            row["right"] = count
        else:
            row["called"][classes[answer]] = count
    return [found[label] for label in sorted(found)]


N_BATCHES = 50


def fit_batch_norm_(components: Components, n_batches: int = N_BATCHES) -> None:
    """Re-estimate the running statistics for the weights that the network now has, where they are not frozen.

    Statistics gathered while the weights moved do not fit their average (Izmailov et al., UAI 2018, section 3.2). They
    are measured on the first `n_batches` training batches of the sources (`TrainBatches.batch` of steps 0 to 49,
    augmented as in training, the domains apart where the network has a context), so that they depend on the weights
    alone. The processes share the batches and take the mean.
    """
    layers = _learning(components.network)
    if not layers:
        return
    accelerator, network = components.accelerator, components.network
    batches = (components.batches.batch(step) for step in range(n_batches))
    passes = (partial(network.features, batch.images.to(accelerator.device), batch.sizes) for batch in batches)
    _estimate_(network, layers, passes)
    if accelerator.num_processes > 1:
        for buffer in _statistics(layers):
            shared = accelerator.reduce(buffer, reduction="mean")
            assert isinstance(shared, Tensor)
            buffer.copy_(shared)


def take_batch_norm_of_the_first_process_(components: Components) -> None:
    """Give every process the running statistics of the first, which are those that are saved.

    A training step begins with that (`DistributedDataParallel`), but its forward pass then moves each process's own: an
    evaluation right behind it would be of several networks.
    """
    if components.accelerator.num_processes > 1:
        for buffer in _statistics(_learning(components.network)):
            first = broadcast(buffer)
            assert isinstance(first, Tensor)
            buffer.copy_(first)


def estimate_statistics_(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of every batch-norm layer to the mean of what they are on each batch.

    All else is in evaluation mode: the weights are those that are saved, nothing is dropped. The mode is put back.

    Args:
        network: changed in place.
        batches: images (n, C, H, W) on the network's device; of the same n, so that each counts the same.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> estimate_statistics_(layer, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])])
        >>> layer.running_mean.tolist(), layer.running_var.tolist()  # variances 2 and 8
        ([3.5], [5.0])
    """
    _estimate_(network, _layers(network), (partial(network, images) for images in batches))


@torch.no_grad()
def _estimate_(network: nn.Module, layers: Sequence[_BatchNorm], passes: Iterable[Callable[[], object]]) -> None:
    momenta = [layer.momentum for layer in layers]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # PyTorch's name for the mean of all batches
        layer.train()
    try:
        with parametrize.cached():
            for forward in passes:
                forward()
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _layers(network: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


def _statistics(layers: Sequence[_BatchNorm]) -> list[Tensor]:
    return [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None]


def _learning(network: Network) -> list[_BatchNorm]:
    """Return the layers whose statistics training moves: all, or all outside of a featurizer that keeps its own."""
    frozen = set(network.featurizer.modules()) if network.freeze_bn else set()
    return [layer for layer in _layers(network) if layer not in frozen]
