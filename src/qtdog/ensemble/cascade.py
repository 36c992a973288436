"""Asking an ensemble's members one after another, and no further where the first ones agree confidently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtdog.core.errors import ConfigError
from qtdog.ensemble.model import EnsembleInfo, EnsembleModel

NEVER = float("inf")
"""The threshold with which every member is asked."""
ALLOWED_LOSS_FRAC = 0.001
N_TRIES = 1000


@dataclass(frozen=True)
class Group:
    """Images that were settled by the same number of members.

    Attributes:
        places: their positions in the batch, shape (n,).
        logits: of the members that were asked, (members asked, n, n_classes).
    """

    places: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Threshold:
    """A confidence at which asking may stop, and what it does on the images that it was chosen by.

    Attributes:
        value: of the first choice's probability; NEVER where stopping would cost too much.
        accuracy: of the cascade.
        accuracy_all: with all members.
        members: asked per image, on average.
    """

    value: float
    accuracy: float
    accuracy_all: float
    members: float


def ask(
    members: Callable[[int, Tensor], Tensor], n_members: int, images: Tensor, rule: tuple[float, float]
) -> list[Group]:
    """Return the logits of as many members as each image needs.

    After each member, an image is settled if all members so far have the same first choice and the probability of that
    choice, softmax(mean logits / T), is at least the threshold.

    Args:
        members: member k's logits (n, n_classes) of images, as `members(k, images)`.
        n_members: how many there are.
        images: shape (n, …).
        rule: threshold and temperature T.

    Returns:
        A group for each number of members that settled some image, by that number; with `NEVER` one, of all images.

    Example:
        >>> def member(k, images):
        ...     return images * torch.tensor([1.0, 0.0])
        >>> groups = ask(member, 3, torch.tensor([[9.0], [0.1]]), (0.9, 1.0))
        >>> [(group.places.tolist(), len(group.logits)) for group in groups]
        [([0], 1), ([1], 3)]
    """
    places = torch.arange(len(images), device=images.device)
    logits: Tensor | None = None
    groups: list[Group] = []
    for index in range(n_members):
        one = members(index, images)[None]
        logits = one if logits is None else torch.cat([logits, one])
        settled = confidence(logits, rule[1])[-1] >= rule[0]
        if index == n_members - 1:
            settled[:] = True
        if settled.any():
            groups.append(Group(places[settled], logits[:, settled]))
            left = ~settled
            places, images, logits = places[left], images[left], logits[:, left]
        if not len(places):
            break
    return groups


class CascadeModel(nn.Module):
    """An ensemble that asks no more members than an image needs.

    Attributes:
        model: the ensemble.
        threshold: confidence at which asking stops.

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
        """What the file says of the ensemble."""
        return self.model.info

    def prepare(self, images: Tensor) -> Tensor:
        """Return the networks' input, as `EnsembleModel.prepare`."""
        return self.model.prepare(images)

    @torch.no_grad()
    def ask(self, inputs: Tensor) -> list[Group]:
        """Return the logits of as many members as each input (n, …) needs."""
        members = self.model.members
        rule = (self.threshold, self.info.temperature)
        return ask(lambda index, part: members[index](part), len(members), inputs, rule)


def confidence(logits: Tensor, temperature: float) -> Tensor:
    """Return how sure the first j members are, j = 1 … m: the probability of their choice, or 0 where they disagree.

    Args:
        logits: shape (m, n, n_classes).
        temperature: T.

    Returns:
        (m, n)

    Example:
        >>> agree, differ = [[[2.0, 0.0]], [[2.0, 0.0]]], [[[2.0, 0.0]], [[0.0, 2.0]]]
        >>> [confidence(torch.tensor(logits), 1.0)[:, 0] for logits in (agree, differ)]
        [tensor([0.8808, 0.8808]), tensor([0.8808, 0.0000])]
    """
    counts = torch.arange(1, len(logits) + 1, device=logits.device, dtype=logits.dtype).reshape(-1, 1, 1)
    probabilities = (logits.cumsum(0) / counts / temperature).softmax(-1)
    choices = logits.argmax(-1)
    agree = (choices == choices[:1]).cummin(0).values
    return probabilities.amax(-1) * agree


def depth(logits: Tensor, threshold: float, temperature: float) -> Tensor:
    """Return how many members each image needs, shape (n,), when all logits (m, n, n_classes) are there already.

    Example:
        >>> logits = torch.tensor([[[9.0, 0.0], [0.1, 0.0]]] * 3)
        >>> depth(logits, 0.9, 1.0).tolist()
        [1, 3]
    """
    return _depth(confidence(logits, temperature), threshold)


def _depth(found: Tensor, threshold: float) -> Tensor:
    enough = found >= threshold
    enough[-1] = True
    return enough.to(torch.uint8).argmax(0) + 1


def settle(logits: Tensor, depths: Tensor) -> Tensor:
    """Return the mean logits (n, n_classes) of each image's first `depths` members.

    Example:
        >>> settle(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([2]))
        tensor([[2.]])
    """
    sums = logits.cumsum(0)
    chosen = sums.gather(0, (depths - 1)[None, :, None].expand(1, -1, logits.shape[-1]))[0]
    return chosen / depths[:, None]


def measure(logits: Tensor, labels: Tensor, threshold: float, temperature: float) -> Threshold:
    """Return what a threshold does on labelled images.

    Args:
        logits: of all members, shape (m, n, n_classes).
        labels: (n,).
        threshold: see `Threshold.value`.
        temperature: T.
    """
    depths = depth(logits, threshold, temperature)
    right = settle(logits, depths).argmax(1) == labels
    right_all = logits.mean(0).argmax(1) == labels
    means = [value.double().mean().item() for value in (right, right_all, depths)]
    return Threshold(threshold, *means)


def choose_threshold(
    logits: Tensor, labels: Tensor, temperature: float, allowed_loss: float = ALLOWED_LOSS_FRAC
) -> Threshold:
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
    best = Threshold(NEVER, accuracy_all, accuracy_all, float(len(logits)))
    early = found[:-1]
    values = early[early > 0].unique().flip(0)
    for value in values[:: -(-len(values) // N_TRIES) or 1].tolist():
        depths = _depth(found, value)
        accuracy = right.gather(0, depths[None] - 1).mean().item()
        if accuracy < accuracy_all - allowed_loss:
            break
        best = Threshold(value, accuracy, accuracy_all, depths.double().mean().item())
    return best


def plan_cascade(
    source: Sequence[tuple[Tensor, Tensor]],
    test: Sequence[tuple[Tensor, Tensor]],
    temperature: float,
    allowed_loss: float = ALLOWED_LOSS_FRAC,
) -> dict[str, Any]:
    """Return the threshold for an ensemble, chosen on the sources alone, and what it does on sources and test images.

    Args:
        source: members' logits (m, n, n_classes) and labels (n,) on held-out source images, batch by batch.
        test: the same on test images.
        temperature: T.
        allowed_loss: as in `choose_threshold`.

    Returns:
        `threshold`, None where there are no such images or none saves anything, `allowed_loss_frac`, and for `source`
        and `test`, where there are any, `accuracy`, `accuracy_all` and `members`.

    Example:
        >>> right = (torch.tensor([[[9.0, 0.0]]] * 3), torch.tensor([0]))
        >>> told = plan_cascade([right], [], 1.0)
        >>> round(told["threshold"], 3), told["source"]["members"]
        (1.0, 1.0)
    """
    told: dict[str, Any] = {"threshold": None, "allowed_loss_frac": allowed_loss}
    if not source:
        return told
    chosen = choose_threshold(*_joined(source), temperature, allowed_loss)
    if chosen.value == NEVER:
        return told
    told["threshold"] = chosen.value
    for name, kept in (("source", source), ("test", test)):
        if kept:
            found = asdict(measure(*_joined(kept), chosen.value, temperature))
            told[name] = {key: found[key] for key in ("accuracy", "accuracy_all", "members")}
    return told


def _joined(kept: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([logits for logits, _ in kept], 1), torch.cat([labels for _, labels in kept])
