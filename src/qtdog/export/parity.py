"""Does an exported file answer as the packed model does? Measured on real images, before the file is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qtdog.core.progress import Progress
from qtdog.export.images import LabelledImages
from qtdog.export.inference_module import ASKED

Ask = Callable[[npt.NDArray[np.uint8]], dict[str, Any]]
BATCH = 32


@dataclass(frozen=True)
class ParityLimits:
    """How far an exported file may be from the packed model.

    Attributes:
        agreement_frac: least share of images with the same first choice.
        logits: largest difference of a logit, as a share of the largest logit (and at least of 1); None for no limit.
        accuracy_loss: largest loss of accuracy, beyond what chance explains (two standard errors); None for no limit.
    """

    agreement_frac: float
    logits: float | None = None
    accuracy_loss: float | None = None


FLOAT = ParityLimits(agreement_frac=0.999, logits=1e-4)
INTEGER = ParityLimits(agreement_frac=0.8, accuracy_loss=0.005)
ROUNDED = ParityLimits(agreement_frac=0.9, accuracy_loss=0.005)
"""Of a float graph that rounds activations as training did: a value half-way between two points may fall to either."""


@dataclass(frozen=True)
class Parity:
    """How an exported file compares with the packed model.

    Attributes:
        n_images: compared.
        domains: of these images.
        agreement_frac: share with the same first choice.
        max_difference: of each output, by name; in a cascade, of the images that asked as many members of both.
        rms_difference: of the logits, likewise.
        largest_logit: of the packed model, absolute.
        accuracy_packed: share of right answers of the packed model.
        accuracy_exported: of the exported file.
        n_lost: images that only the packed model gets right.
        n_gained: images that only the exported file gets right.
        members: that a cascade asks on average, the packed one and the exported one; None without a cascade.
        same_members_frac: share of the images that asked as many members of both; 1 without a cascade.
        validation: whether the images were held out from training; else the model may have been trained on them.
    """

    n_images: int
    domains: tuple[str, ...]
    agreement_frac: float
    max_difference: dict[str, float]
    rms_difference: float
    largest_logit: float
    accuracy_packed: float
    accuracy_exported: float
    n_lost: int
    n_gained: int
    members: tuple[float, float] | None = None
    same_members_frac: float = 1.0
    validation: bool = False

    @property
    def accuracy_loss(self) -> float:
        """Accuracy of the packed model less that of the exported file."""
        return self.accuracy_packed - self.accuracy_exported

    @property
    def standard_error(self) -> float:
        """Of the accuracy loss: √(lost + gained) / n, as in McNemar's test of paired answers."""
        return math.sqrt(self.n_lost + self.n_gained) / self.n_images

    def problems(self, limits: ParityLimits) -> list[str]:
        """Return in words where the limits are passed; empty if they are kept."""
        found = []
        if self.agreement_frac < limits.agreement_frac:
            found.append(f"the same class on {self.agreement_frac:.2%}, expected at least {limits.agreement_frac:.1%}")
        size = max(1.0, self.largest_logit)
        worst = self.max_difference["logits"]
        if limits.logits is not None and not worst <= limits.logits * size:
            found.append(f"a logit is off by {worst:.2g}, expected at most {limits.logits * size:.2g}")
        if limits.accuracy_loss is not None and self.accuracy_loss - 2 * self.standard_error > limits.accuracy_loss:
            loss, allowed = 100 * self.accuracy_loss, 100 * limits.accuracy_loss
            found.append(f"{loss:.2f} points of accuracy lost, expected at most {allowed:.2f} beyond chance")
        return found


def images_of(parity: Parity) -> str:
    """Return in words what images a file was compared on.

    Example:
        >>> images_of(Parity(9, ("a", "b"), 1, {}, 0, 1, 1, 1, 0, 0, validation=True))
        'validation images of a, b'
    """
    kind = "validation images" if parity.validation else "images (some of which it was trained on)"
    return f"{kind} of {', '.join(parity.domains)}"


def measure_parity(packed: Ask, exported: Ask, images: LabelledImages, progress: Progress = None) -> Parity:
    """Return how an exported file compares with the packed model on the same images.

    Args:
        packed: uint8 images to outputs by name.
        exported: likewise.
        images: at least one.
        progress: called with images done and to do.

    Example:
        >>> pixels = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
        >>> def ask(images):
        ...     return {"logits": np.stack([images.reshape(-1), np.full(len(images), 1.5)], 1).astype(np.float32)}
        >>> images = LabelledImages(pixels, np.array([1, 1, 0, 0]), ("a",))
        >>> found = measure_parity(ask, lambda x: {"logits": -ask(x)["logits"]}, images)
        >>> found.agreement_frac, found.accuracy_packed, found.problems(FLOAT)[0]
        (0.0, 1.0, 'the same class on 0.00%, expected at least 99.9%')
    """
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for start in range(0, len(images.pixels), BATCH):
        part = images.pixels[start : start + BATCH]
        ours.append(packed(part))
        theirs.append(exported(part))
        if progress is not None:
            progress(min(start + BATCH, len(images.pixels)), len(images.pixels))
    one, other = ({name: np.concatenate([part[name] for part in side]) for name in side[0]} for side in (ours, theirs))
    same = one[ASKED] == other[ASKED] if ASKED in one else np.ones(len(images.pixels), dtype=bool)
    apart = {name: np.subtract(one[name][same], other[name][same], dtype=np.float32) for name in one}
    choices = one["logits"].argmax(1), other["logits"].argmax(1)
    right = choices[0] == images.labels, choices[1] == images.labels
    return Parity(
        n_images=len(images.pixels),
        domains=images.domains,
        agreement_frac=float((choices[0] == choices[1]).mean()),
        max_difference={name: float(np.abs(difference).max(initial=0)) for name, difference in apart.items()},
        rms_difference=float(np.sqrt(np.square(apart["logits"]).sum() / max(apart["logits"].size, 1))),
        largest_logit=float(np.abs(one["logits"]).max()),
        accuracy_packed=float(right[0].mean()),
        accuracy_exported=float(right[1].mean()),
        n_lost=int((right[0] & ~right[1]).sum()),
        n_gained=int((right[1] & ~right[0]).sum()),
        members=(float(one[ASKED].mean()), float(other[ASKED].mean())) if ASKED in one else None,
        same_members_frac=float(same.mean()),
        validation=images.validation,
    )
