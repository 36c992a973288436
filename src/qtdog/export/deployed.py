"""The model as one function from pixels to answers: what every format holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtdog.export.answer import Answer, settled
from qtdog.models.network import Network
from qtdog.training.load import Preprocessing

INPUT = "images"
OUTPUTS = {
    False: ("logits", "probabilities"),
    True: ("logits", "probabilities", "entropy", "mutual_information", "agreement"),
}
"""Names of the outputs, by whether there are several members."""
ASKED = "members"
"""Name of the output that a cascade has besides."""


class Prepare(nn.Module):
    """From pixels to the networks' input: x = (pixel / 255 - mean) / std.

    Args:
        how: the preprocessing.

    Shapes:
        uint8 (n, H, W, C) → float32 (n, C, H, W)
    """

    def __init__(self, how: Preprocessing) -> None:
        super().__init__()
        std = torch.tensor(how.std)
        self.register_buffer("pixel_scale", 1 / (255 * std))
        self.register_buffer("pixel_offset", torch.tensor(how.mean) / std)

    def forward(self, images: Tensor) -> Tensor:
        """Return the networks' input for uint8 images."""
        inputs = images.to(torch.float32) * self.get_buffer("pixel_scale") - self.get_buffer("pixel_offset")
        return inputs.permute(0, 3, 1, 2)


class Deployed(nn.Module):
    """Members with preprocessing before and `Answer` behind them.

    With a threshold it is a cascade: members are asked one after another, each only about the images that the ones
    before have not settled (`answer.settled`), and the number of members that were asked is one more output.

    Args:
        networks: the members, dequantized.
        how: their preprocessing.
        temperature: of the probabilities.
        threshold: confidence at which no further member is asked; None to ask all.

    Shapes:
        uint8 (n, H, W, C) → logits and probabilities (n, n_classes), each doubt and members (n,)

    Example:
        >>> head = nn.Linear(12, 3)
        >>> how = Preprocessing(image_size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> model = Deployed([Network(nn.Flatten(), head, freeze_bn=True)], how)
        >>> [tuple(output.shape) for output in model(torch.zeros(4, 2, 2, 3, dtype=torch.uint8))]
        [(4, 3), (4, 3)]
    """

    def __init__(
        self,
        networks: Sequence[Network],
        how: Preprocessing,
        temperature: float = 1.0,
        threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(networks)
        self.prepare = Prepare(how)
        self.answer = Answer(temperature)
        self.threshold = threshold
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in the order of `OUTPUTS`, of uint8 images (n, H, W, C)."""
        inputs = self.prepare(images)
        if self.threshold is None:
            return self.answer(torch.stack([member(inputs) for member in self.members], 1))
        logits, asked = self._ask(inputs, self.threshold)
        return *self.answer(logits, asked), asked

    def _ask(self, inputs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Return logits (n, members, n_classes), zero where a member was not asked, and how many were, (n,)."""
        n, n_members = len(inputs), len(self.members)
        logits = torch.zeros(n, 0, 0, device=inputs.device)
        asked = torch.zeros(n, dtype=torch.int64, device=inputs.device)
        left = torch.arange(n, device=inputs.device)
        for index, member in enumerate(self.members):
            one = member(inputs[left])
            if not index:
                logits = one.new_zeros(n, n_members, one.shape[1])
            logits[left, index] = one
            asked[left] = index + 1
            left = left[~settled(logits[left, : index + 1], self.answer.temperature, threshold)]
            if not len(left):
                break
        return logits, asked
