"""Accuracy and loss of a network over images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from qtdog.runs.record import Score


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
