"""One pass of a model over images: what it answers, and the loss by domain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from qtdog.analysis.subject import Images
from qtdog.core.progress import Progress
from qtdog.training.load import ShippedModel

BATCH = 128


def batches(model: ShippedModel, images: Images, *, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) as the model takes them, on its device, in order."""
    device = next(model.network.parameters()).device
    for pixels, labels in zip(images.pixels.split(size), images.labels.split(size), strict=True):
        yield model.prepare(pixels).to(device), labels.to(device)


@torch.no_grad()
def logits(model: ShippedModel, images: Images, *, check: Callable[[], None] = lambda: None) -> Tensor:
    """Return the logits (n, n_classes) of images, on the CPU.

    Args:
        model: in evaluation mode.
        images: as they are stored.
        check: called before each batch; may raise to break off.
    """
    answers = []
    for prepared, _ in batches(model, images):
        check()
        answers.append(model(prepared).float().cpu())
    return torch.cat(answers)


def losses_by_domain(
    model: ShippedModel, domains: Mapping[str, Images], *, check: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the mean cross-entropy of each domain: one pass over all its images.

    Raises:
        whatever `check` raises.
    """
    return {
        domain: functional.cross_entropy(logits(model, images, check=check).double(), images.labels).item()
        for domain, images in domains.items()
    }


def role_mean(losses: Mapping[str, float | str], domains: tuple[str, ...]) -> float:
    """Return the mean over some domains, each counting once whatever its size; losses may be a row of `points.csv`.

    Example:
        >>> role_mean({"a": 1.0, "b": "2.0", "c": 9.0}, ("a", "b"))
        1.5
    """
    return sum(float(losses[domain]) for domain in domains) / len(domains)


def shift(progress: Progress, before: int, total: int) -> Progress:
    """Return the progress of a part, told as progress of the whole: (done, n) becomes (before + done, total).

    Example:
        >>> shift(lambda done, total: print(done, total), 10, 30)(5, 10)
        15 30
    """
    return None if progress is None else lambda done, n: progress(before + done, total)
