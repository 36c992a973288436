"""What an objective sees of a training step: the images of each domain, and the model as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class DomainOutputs:
    """What the network said about the images of one source domain in a batch, or in a process's share of it.

    Attributes:
        features: penultimate features, shape (n, d).
        logits: class scores before softmax, shape (n, n_classes).
        labels: class indices, int64, shape (n,).
    """

    features: Tensor
    logits: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DomainBatch:
    """The images of one step, domain after domain, on the device.

    Attributes:
        images: normalised, shape (n, C, H, W).
        labels: int64, shape (n,).
        sizes: images per domain; they add up to n.
        step: updates made before this one.
    """

    images: Tensor
    labels: Tensor
    sizes: tuple[int, ...]
    step: int = 0

    def split(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of each domain."""
        return zip(self.images.split(self.sizes), self.labels.split(self.sizes), strict=True)


def _alone(rows: Tensor) -> Sequence[Tensor]:
    return [rows]


@dataclass(frozen=True)
class ModelView:
    """The model as functions of images, features or parameters.

    Attributes:
        model: images → (features, logits), as training runs it (possibly wrapped for several processes).
        network: the plain network inside, with `featurizer` and `classifier`; its own forward gives logits.
        of_all: rows of this process → those of every process that shares the batch, in their order.
    """

    model: nn.Module
    network: nn.Module
    of_all: Callable[[Tensor], Sequence[Tensor]] = _alone

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (n, d) and logits (n, n_classes) of images (n, C, H, W)."""
        # A weight that several modules share, or that is read twice, is quantized once per pass.
        with parametrize.cached():
            return self.model(images)

    def outputs(self, batch: DomainBatch) -> list[DomainOutputs]:
        """Return the outputs of each domain over the images of all processes, from one pass of each over its own."""
        return self.joined(self.own_outputs(batch))

    def own_outputs(self, batch: DomainBatch) -> list[DomainOutputs]:
        """Return the outputs of each domain over the images of this process."""
        features, logits = self(batch.images)
        split = zip(*(tensor.split(batch.sizes) for tensor in (features, logits, batch.labels)), strict=True)
        return [DomainOutputs(*domain) for domain in split]

    def joined(self, own: Sequence[DomainOutputs]) -> list[DomainOutputs]:
        """Return the outputs of each domain over the images of all processes, in the order of the whole batch."""
        return [
            DomainOutputs(self._whole(domain.features), self._whole(domain.logits), self._whole(domain.labels))
            for domain in own
        ]

    def _whole(self, rows: Tensor) -> Tensor:
        parts = self.of_all(rows)  # process r of n has rows r, r + n, … of a domain
        return rows if len(parts) == 1 else torch.stack(list(parts), dim=1).flatten(0, 1)

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits (n, n_classes) of features (n, d)."""
        return self.network.get_submodule("classifier")(features)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what trains of the network by name: latent weights, step sizes and the rest."""
        return {name: value for name, value in self.network.named_parameters() if value.requires_grad}

    def logits_with(self, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Return the logits (n, n_classes) that the network would give with other values of its parameters."""
        return functional_call(self.network, dict(parameters), (images,))


def gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of `loss` for each parameter that it reaches, detached.

    Example:
        >>> w, unused = torch.tensor([3.0, 1.0], requires_grad=True).unbind()
        >>> gradients(w**2, {"w": w, "unused": unused})
        {'w': tensor(6.)}
    """
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}
