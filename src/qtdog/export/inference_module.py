"""The model as one function from pixels to answers and uncertainty: what every format holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtdog.models.network import Network
from qtdog.training.load_model import Preprocessing


class AnswerHead(nn.Module):
    """The outputs of a model: of one network logits and probabilities, of several also their disagreement.

    Logits z = mean_m z_m; probabilities p = softmax(z / T). Several members also say the entropy of p in nats, the
    mutual information H(mean_m p_m) - mean_m H(p_m) between class and member (Depeweg et al., ICML 2018, Eq. 5), and
    the share of the members whose first choice is the ensemble's: as in `qtdog predict`.

    Args:
        temperature: T.
        accept_threshold: smallest probability of an answer that is accepted; None for no such output.

    Shapes:
        (n, members, n_classes) → logits and probabilities (n, n_classes), each disagreement (n,), and with a threshold
        whether the answer is accepted, bool (n,)

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> found = AnswerHead()(logits)
        >>> found[0].tolist(), found[4].tolist()
        ([[1.0, 1.0]], [0.5])
    """

    def __init__(self, temperature: float = 1.0, accept_threshold: float | None = None) -> None:
        super().__init__()
        self.temperature, self.accept_threshold = temperature, accept_threshold

    def forward(self, each: Tensor) -> tuple[Tensor, ...]:
        """Return logits and probabilities, of several members their disagreement, and what a threshold accepts."""
        answers = self._answers(each)
        if self.accept_threshold is None:
            return answers
        return *answers, answers[1].amax(1) >= self.accept_threshold

    def _answers(self, each: Tensor) -> tuple[Tensor, ...]:
        if each.shape[1] == 1:
            logits = each[:, 0]
            return logits, (logits / self.temperature).softmax(1)
        logits = each.mean(1)
        log_p = (logits / self.temperature).log_softmax(1)
        log_each = (each / self.temperature).log_softmax(2)
        mixture = log_each.exp().mean(1)
        # the smallest normal number stands in for 0, where the limit of p log p is 0
        whole = -(mixture * mixture.clamp(min=torch.finfo(torch.float32).tiny).log()).sum(1)
        disagreement = (whole - _entropy(log_each).mean(1)).clamp(min=0)
        agrees = (each.argmax(2) == logits.argmax(1, keepdim=True)).to(torch.float32)
        return logits, log_p.exp(), _entropy(log_p), disagreement, agrees.mean(1)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


INPUT = "images"
OUTPUTS = {
    False: ("logits", "probabilities"),
    True: ("logits", "probabilities", "entropy", "mutual_information", "agreement"),
}
"""Names of the outputs, by whether there are several members."""
ACCEPT = "accept"
"""Name of the output that a model with a threshold has besides: whether the answer is accepted."""


class Prepare(nn.Module):
    """From pixels to the networks' input: x = (pixel / 255 - mean) / std.

    Args:
        preprocessing: the preprocessing.

    Shapes:
        uint8 (n, H, W, C) → float32 (n, C, H, W)
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        std = torch.tensor(preprocessing.std)
        self.register_buffer("pixel_scale", 1 / (255 * std))
        self.register_buffer("pixel_offset", torch.tensor(preprocessing.mean) / std)

    def forward(self, images: Tensor) -> Tensor:
        """Return the networks' input for uint8 images."""
        inputs = images.to(torch.float32) * self.get_buffer("pixel_scale") - self.get_buffer("pixel_offset")
        return inputs.permute(0, 3, 1, 2)


class InferenceModule(nn.Module):
    """Members with preprocessing before and `AnswerHead` behind them.

    Args:
        networks: the members, dequantized.
        preprocessing: their preprocessing.
        temperature: of the probabilities.
        accept_threshold: smallest probability of an answer that is accepted, or None.

    Shapes:
        uint8 (n, H, W, C) → logits and probabilities (n, n_classes), each disagreement and accept (n,)

    Example:
        >>> head = nn.Linear(12, 3)
        >>> preprocessing = Preprocessing(image_size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> model = InferenceModule([Network(nn.Flatten(), head, freeze_bn=True)], preprocessing)
        >>> [tuple(output.shape) for output in model(torch.zeros(4, 2, 2, 3, dtype=torch.uint8))]
        [(4, 3), (4, 3)]
    """

    def __init__(
        self,
        networks: Sequence[Network],
        preprocessing: Preprocessing,
        temperature: float = 1.0,
        accept_threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(networks)
        self.prepare = Prepare(preprocessing)
        self.answer = AnswerHead(temperature, accept_threshold)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in the order of `OUTPUTS`, of uint8 images (n, H, W, C)."""
        inputs = self.prepare(images)
        return self.answer(torch.stack([member(inputs) for member in self.members], 1))
