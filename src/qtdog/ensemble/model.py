"""Several networks that answer as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtdog.data.augment import normalise
from qtdog.models.network import Network
from qtdog.training.load import ModelInfo, Preprocessing

BATCH = 64


@dataclass(frozen=True)
class EnsembleInfo:
    """What an ensemble file says of itself.

    Attributes:
        kind: a name of `ensemble.kinds.KINDS`.
        members: what each member's own file says.
        accuracy: of the ensemble: `source` (held-out part of the sources) and `test`; None where it was not measured.
        training_steps: updates behind all members, a shared beginning counted once.
        training_runs: the same in lengths of one member's run.
        temperature: of the probabilities, fitted on the sources' held-out images; 1 where that was not possible.
        cascade_threshold: confidence at which no further member need be asked (`ensemble.cascade`), chosen on the
            same images; None where that was not possible.
    """

    kind: str
    members: tuple[ModelInfo, ...]
    accuracy: dict[str, float | None]
    training_steps: int
    training_runs: float
    temperature: float = 1.0
    cascade_threshold: float | None = None

    @property
    def backbone(self) -> str:
        """Name of the backbone of every member."""
        return self.members[0].backbone

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.members[0].classes

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the networks' input."""
        return self.members[0].preprocessing

    @property
    def source_domains(self) -> tuple[str, ...]:
        """The domains that every member was trained on."""
        return self.members[0].source_domains

    @property
    def target_domain(self) -> str | None:
        """The domain that was held out in training, or None."""
        return self.members[0].target_domain


class EnsembleModel(nn.Module):
    """Members that are asked one after another; the answer is the class with the largest mean logit.

    ŷ = argmax softmax((1/m) Σ_k f_k(x)), paper Eq. 6. One image costs m forward passes; in memory are the weights of
    all members in float32 and, without gradients, the activations of one of them.

    Attributes:
        members: the networks, in evaluation mode.
        info: what the file says of itself.
    """

    def __init__(self, members: Sequence[Network], info: EnsembleInfo) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.info = info
        self.eval()

    def member_logits(self, images: Tensor) -> Tensor:
        """Return each member's logits (m, n, n_classes) of normalised images (n, C, H, W)."""
        return torch.stack([member(images) for member in self.members])

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean logits (n, n_classes) of normalised images (n, C, H, W)."""
        return self.member_logits(images).mean(0)

    def prepare(self, images: Tensor) -> Tensor:
        """Return the networks' input (n, C, H, W) for uint8 images (n, H, W, C) of the right size."""
        how = self.info.preprocessing
        return normalise(images, how.mean, how.std)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return class probabilities (n, n_classes) of uint8 images (n, H, W, C): softmax(mean logits / T).

        At most 64 images at a time are normalised and passed on, so that memory does not grow with n.
        """
        device = next(self.parameters()).device
        parts = [self(self.prepare(part).to(device)) for part in images.split(BATCH)]
        return (torch.cat(parts) / self.info.temperature).softmax(1)
