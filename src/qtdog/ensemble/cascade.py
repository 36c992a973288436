"""Asking an ensemble's members one after another, and no further where the first ones agree confidently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtdog.core.errors import ConfigError
from qtdog.ensemble.model import EnsembleInfo, EnsembleModel
from qtdog.training.calibration import LabeledLogits

ASK_ALL = float("inf")
"""The threshold with which every member is asked."""
ALLOWED_LOSS_FRAC = 0.001
MAX_CANDIDATES = 1000


def confidence(logits: Tensor, temperature: float) -> Tensor:
    """Return the confidence of the first j members together, j = 1 … m.

    It is the probability of their choice, max softmax(mean logits / T), or 0 where their first choices differ.

    Args:
        logits: shape (m, n, n_classes).
        temperature: T.

    Returns:
        Shape (m, n).

    Example:
        >>> agree, differ = [[[2.0, 0.0]], [[2.0, 0.0]]], [[[2.0, 0.0]], [[0.0, 2.0]]]
        >>> [confidence(torch.tensor(logits), 1.0)[:, 0] for logits in (agree, differ)]
        [tensor([0.8808, 0.8808]), tensor([0.8808, 0.0000])]
    """
    return torch.stack([_confidence(logits[: j + 1], temperature) for j in range(len(logits))])


def _confidence(logits: Tensor, temperature: float) -> Tensor:
    """Return the confidence (n,) of all members together, in operators that exporters know."""
    # of a cumulative sum the last row is the same, bit for bit, whether more rows follow or not
    mean = logits.cumsum(0)[-1] / logits.shape[0]
    choices = logits.argmax(2)
    return (mean / temperature).softmax(1).amax(1) * (choices == choices[:1]).all(0)


def is_settled(logits: Tensor, temperature: float, threshold: float) -> Tensor:
    """Return which images need no further member: the rule of the cascade.

    An image is settled if all members asked so far have the same first choice, and the probability of that choice
    reaches the threshold.

    Args:
        logits: of the members asked so far, shape (m, n, n_classes).
        temperature: T.
        threshold: a probability, or `ASK_ALL`.

    Returns:
        Bool, shape (n,).

    Example:
        >>> is_settled(torch.tensor([[[9.0, 0.0], [0.1, 0.0]]]), 1.0, 0.9)
        tensor([ True, False])
    """
    return _confidence(logits, temperature) >= threshold


def members_needed(logits: Tensor, threshold: float, temperature: float) -> Tensor:
    """Return how many members each image needs, int64 (n,), given the logits (m, n, n_classes) of all.

    Example:
        >>> logits = torch.tensor([[[9.0, 0.0], [0.1, 0.0]]] * 3)
        >>> members_needed(logits, 0.9, 1.0).tolist()
        [1, 3]
    """
    return _first_settled(confidence(logits, temperature), threshold)


def _first_settled(confidences: Tensor, threshold: float) -> Tensor:
    settled = confidences >= threshold
    settled[-1] = True
    return settled.to(torch.uint8).argmax(0) + 1


@dataclass(frozen=True)
class SettledImages:
    """Images that were settled by the same number of members.

    Attributes:
        indices: their positions in the batch, shape (n,).
        logits: of the members that were asked, (members asked, n, n_classes).
    """

    indices: Tensor
    logits: Tensor


def run_cascade(
    member_logits: Callable[[int, Tensor], Tensor],
    n_members: int,
    images: Tensor,
    *,
    threshold: float,
    temperature: float,
) -> list[SettledImages]:
    """Return the logits of as many members as each image needs (`is_settled`).

    Args:
        member_logits: member k's logits (n, n_classes) of images, as `member_logits(k, images)`.
        n_members: how many there are.
        images: shape (n, …).
        threshold: of the confidence.
        temperature: T.

    Returns:
        One entry for each number of members that settled some image, by that number; with `ASK_ALL` a single one.

    Example:
        >>> def member(k, images):
        ...     return images * torch.tensor([1.0, 0.0])
        >>> found = run_cascade(member, 3, torch.tensor([[9.0], [0.1]]), threshold=0.9, temperature=1.0)
        >>> [(part.indices.tolist(), len(part.logits)) for part in found]
        [([0], 1), ([1], 3)]
    """
    indices = torch.arange(len(images), device=images.device)
    logits: Tensor | None = None
    found: list[SettledImages] = []
    for index in range(n_members):
        one = member_logits(index, images)[None]
        logits = one if logits is None else torch.cat([logits, one])
        settled = is_settled(logits, temperature, threshold)
        if index == n_members - 1:
            settled[:] = True
        if settled.any():
            found.append(SettledImages(indices[settled], logits[:, settled]))
            left = ~settled
            indices, images, logits = indices[left], images[left], logits[:, left]
        if not len(indices):
            break
    return found


class CascadeModel(nn.Module):
    """An ensemble that asks no more members than an image needs.

    Attributes:
        model: the ensemble.
        threshold: confidence at which no further member is asked.

    Raises:
        ConfigError: the ensemble's file has no threshold.
    """

    def __init__(self, model: EnsembleModel) -> None:
        super().__init__()
        if model.info.cascade_threshold is None:
            raise ConfigError(
                "this ensemble has no threshold for a cascade: its file is older than that, its members share no "
                "held-out source images, or no threshold keeps the accuracy on them; make it again with 'qtdog "
                "ensemble' from members with one data.trial, or leave --cascade out"
            )
        self.model = model
        self.threshold = model.info.cascade_threshold

    @property
    def info(self) -> EnsembleInfo:
        """The description in the ensemble's file."""
        return self.model.info

    def prepare(self, images: Tensor) -> Tensor:
        """Return the networks' input, as `EnsembleModel.prepare` does."""
        return self.model.prepare(images)

    @torch.no_grad()
    def run(self, inputs: Tensor) -> list[SettledImages]:
        """Return the logits of as many members as each input (n, …) needs."""
        members = self.model.members
        return run_cascade(
            lambda index, part: members[index](part),
            len(members),
            inputs,
            threshold=self.threshold,
            temperature=self.info.temperature,
        )


@dataclass(frozen=True)
class CascadeThreshold:
    """A threshold, and what the cascade reaches with it on labeled images.

    Attributes:
        value: of the confidence; `ASK_ALL` where stopping would cost too much.
        accuracy: of the cascade.
        accuracy_all: with all members.
        members: asked per image, on average.
    """

    value: float
    accuracy: float
    accuracy_all: float
    members: float


def cascade_logits(logits: Tensor, n_asked: Tensor) -> Tensor:
    """Return the mean logits (n, n_classes) of the first `n_asked` (n,) members of each image.

    Example:
        >>> cascade_logits(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([2]))
        tensor([[2.]])
    """
    sums = logits.cumsum(0)
    last = (n_asked - 1)[None, :, None].expand(1, -1, logits.shape[-1])
    return sums.gather(0, last)[0] / n_asked[:, None]


def measure_cascade(logits: Tensor, labels: Tensor, threshold: float, temperature: float) -> CascadeThreshold:
    """Return what a threshold does on labeled images.

    Args:
        logits: of all members, shape (m, n, n_classes).
        labels: (n,).
        threshold: see `CascadeThreshold.value`.
        temperature: T.
    """
    n_asked = members_needed(logits, threshold, temperature)
    right = cascade_logits(logits, n_asked).argmax(1) == labels
    right_all = logits.mean(0).argmax(1) == labels
    means = [value.double().mean().item() for value in (right, right_all, n_asked)]
    return CascadeThreshold(threshold, *means)


def choose_threshold(
    logits: Tensor, labels: Tensor, temperature: float, allowed_loss: float = ALLOWED_LOSS_FRAC
) -> CascadeThreshold:
    """Return the lowest threshold that costs at most `allowed_loss` of the accuracy.

    From confidence 1 downwards the thresholds that make a difference are tried (1,000 of them, if there are more), up
    to the first that costs more: one further down that happens to cost less again is not trusted. To be chosen on
    held-out *source* images.

    Args:
        logits: of all members, shape (m, n, n_classes).
        labels: (n,).
        temperature: T.
        allowed_loss: share of the images, 0.001 for 0.1 points of accuracy.

    Example:
        >>> sure, torn = [[9.0, 0.0]] * 3, [[0.2, 0.0], [0.0, 1.0], [0.0, 1.0]]
        >>> logits = torch.tensor([sure, torn]).transpose(0, 1)
        >>> found = choose_threshold(logits, torch.tensor([0, 1]), 1.0)
        >>> round(found.value, 3), found.accuracy, found.members
        (1.0, 1.0, 2.0)
    """
    found = confidence(logits, temperature)
    right = (logits.cumsum(0).argmax(-1) == labels).double()  # of the first j members together
    accuracy_all = (logits.mean(0).argmax(1) == labels).double().mean().item()
    best = CascadeThreshold(ASK_ALL, accuracy_all, accuracy_all, float(len(logits)))
    early = found[:-1]
    values = early[early > 0].unique().flip(0)
    for value in values[:: -(-len(values) // MAX_CANDIDATES) or 1].tolist():
        n_asked = _first_settled(found, value)
        accuracy = right.gather(0, n_asked[None] - 1).mean().item()
        if accuracy < accuracy_all - allowed_loss:
            break
        best = CascadeThreshold(value, accuracy, accuracy_all, n_asked.double().mean().item())
    return best


def plan_cascade(
    source: LabeledLogits | None,
    test: LabeledLogits | None,
    temperature: float,
    allowed_loss: float = ALLOWED_LOSS_FRAC,
) -> dict[str, Any]:
    """Return the threshold for an ensemble, chosen on the sources alone, and what it does on sources and test images.

    Args:
        source: members' logits and labels on held-out source images; None without any.
        test: the same on test images.
        temperature: T.
        allowed_loss: as in `choose_threshold`.

    Returns:
        `threshold`, None where there are no such images or none saves anything, `allowed_loss_frac`, and for `source`
        and `test`, where there are any, `accuracy`, `accuracy_all` and `members`.

    Example:
        >>> right = LabeledLogits(torch.tensor([[[9.0, 0.0]]] * 3), torch.tensor([0]))
        >>> plan = plan_cascade(right, None, 1.0)
        >>> round(plan["threshold"], 3), plan["source"]["members"]
        (1.0, 1.0)
    """
    plan: dict[str, Any] = {"threshold": None, "allowed_loss_frac": allowed_loss}
    if source is None:
        return plan
    chosen = choose_threshold(source.logits, source.labels, temperature, allowed_loss)
    if chosen.value == ASK_ALL:
        return plan
    plan["threshold"] = chosen.value
    for name, images in (("source", source), ("test", test)):
        if images is not None:
            found = asdict(measure_cascade(images.logits, images.labels, chosen.value, temperature))
            plan[name] = {key: found[key] for key in ("accuracy", "accuracy_all", "members")}
    return plan
