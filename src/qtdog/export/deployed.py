"""The model as one function from pixels to answers: what every format holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtdog.models.network import Network
from qtdog.training.shipped import Preprocessing

INPUT = "images"
OUTPUTS = {
    False: ("logits", "probabilities"),
    True: ("logits", "probabilities", "entropy", "mutual_information", "agreement"),
}
"""Names of the outputs, by whether there are several members."""


class Deployed(nn.Module):
    """Members with preprocessing before and doubt behind them.

    x = (pixel / 255 - mean) / std; logits z = mean_m z_m; probabilities p = softmax(z / T). Several members also say
    the entropy of p in nats, the mutual information H(mean_m p_m) - mean_m H(p_m) between class and member (Depeweg et
    al., ICML 2018, Eq. 5), and the share of the members whose first choice is the ensemble's: as in `qtdog predict`,
    written with operators that every runtime has.

    Args:
        networks: the members, dequantized.
        how: their preprocessing.
        temperature: T.

    Shapes:
        uint8 (n, H, W, C) → logits and probabilities (n, n_classes), each doubt (n,)

    Example:
        >>> head = nn.Linear(12, 3)
        >>> how = Preprocessing(image_size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> model = Deployed([Network(nn.Flatten(), head, freeze_bn=True)], how)
        >>> [tuple(output.shape) for output in model(torch.zeros(4, 2, 2, 3, dtype=torch.uint8))]
        [(4, 3), (4, 3)]
    """

    def __init__(self, networks: Sequence[Network], how: Preprocessing, temperature: float = 1.0) -> None:
        super().__init__()
        self.members = nn.ModuleList(networks)
        self.temperature = temperature
        std = torch.tensor(how.std)
        self.register_buffer("pixel_scale", 1 / (255 * std))
        self.register_buffer("pixel_offset", torch.tensor(how.mean) / std)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in the order of `OUTPUTS`, of uint8 images (n, H, W, C)."""
        inputs = images.to(torch.float32) * self.get_buffer("pixel_scale") - self.get_buffer("pixel_offset")
        inputs = inputs.permute(0, 3, 1, 2)
        if len(self.members) == 1:
            logits = self.members[0](inputs)
            return logits, (logits / self.temperature).softmax(1)
        each = [member(inputs) for member in self.members]
        return self._together(each)

    def _together(self, each: list[Tensor]) -> tuple[Tensor, ...]:
        n = len(each)
        logits = _mean(each)
        log_p = (logits / self.temperature).log_softmax(1)
        log_members = [(one / self.temperature).log_softmax(1) for one in each]
        mixture = _mean([log_one.exp() for log_one in log_members])
        # the smallest normal number stands in for 0, where the limit of p log p is 0
        whole = -(mixture * mixture.clamp(min=torch.finfo(torch.float32).tiny).log()).sum(1)
        doubt = (whole - _mean([_entropy(log_one) for log_one in log_members])).clamp(min=0)
        choice = logits.argmax(1)
        agreeing = [(one.argmax(1) == choice).to(torch.float32) for one in each]
        return logits, log_p.exp(), _entropy(log_p), doubt, sum(agreeing[1:], agreeing[0]) / n


def _mean(values: list[Tensor]) -> Tensor:
    # no stack: five tensors side by side would be copied once more
    return sum(values[1:], values[0]) / len(values)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(1)
