"""An objective, a backbone and a data set of one's own, without touching the package.

    python examples/own_methods.py                       # trains and compares; about a minute

The same file is a plug-in of the command line and of studies (`examples/own_study.yaml`):

    qtdog train --plugin examples/own_methods.py --data tinted --target dark --objective worst-domain \
        --backbone patches --weights none --image-size 32 --steps 200
    qtdog sweep examples/own_study.yaml
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.datasets import FakeData
from torchvision.transforms.functional import to_pil_image

import qtdog

CLASSES = ("red", "green", "blue")
BRIGHTNESS = {"dark": 0.4, "dim": 0.6, "day": 0.8, "bright": 1.0}  # the domains


class TintedNoise(FakeData):
    """A torchvision data set that needs no download: noise, tinted in the color of its class."""

    def __init__(self, number: int, brightness: float) -> None:
        super().__init__(60, (3, 32, 32), len(CLASSES), random_offset=1000 * number)
        self.targets = [i % len(CLASSES) for i in range(len(self))]
        self.brightness = brightness

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return an image (PIL) and its class."""
        generator = torch.Generator().manual_seed(self.random_offset + index)
        pixels, label = torch.rand(3, 32, 32, generator=generator), self.targets[index]
        pixels[label] += 0.04
        return to_pil_image((pixels / 1.04 * self.brightness).clamp(0, 1)), label


@qtdog.register("dataset", "tinted")
def tinted() -> qtdog.Dataset:
    """Four domains that differ in brightness. Any torchvision data set takes the place of `TintedNoise`."""
    parts = {name: TintedNoise(number, value) for number, (name, value) in enumerate(BRIGHTNESS.items())}
    return qtdog.Dataset(parts, classes=CLASSES, name="tinted")


@qtdog.register("objective", "worst-domain")
class WorstDomain(qtdog.Objective):
    """The largest loss of any source domain."""

    MIN_DOMAINS = 2

    def loss(self, domains: Any) -> Tensor:
        """Return the loss of the worst domain, a scalar."""
        return torch.stack([cross_entropy(domain.logits, domain.labels) for domain in domains]).max()


@qtdog.register("backbone", "patches")
def patches(channels: int, image_size: int) -> nn.Module:
    """Return a small network: images (n, channels, size, size) in [0, 1] → features (n, 32)."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=4),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def main() -> None:
    """Train the same network with two objectives, and compare them on the domain that neither saw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="runs/own-methods")
    given = parser.parse_args()
    for objective in ("erm", "worst-domain"):
        result = qtdog.train(
            "tinted",
            target="dark",
            objective=objective,
            backbone="patches",
            weights="none",
            image_size=32,
            batch_size=8,
            augment="none",
            steps=given.steps,
            lr=3e-3,
            out=f"{given.output}/{objective}",
        )
        print(result)
    print(qtdog.compare(given.output))


if __name__ == "__main__":
    main()
