"""The model as one function from pixels to answers and uncertainty: what every format holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtdog.ensemble.cascade import is_settled, run_cascade
from qtdog.models.network import Network
from qtdog.training.load_model import Preprocessing


class AnswerHead(nn.Module):
    """The outputs of a model: of one network logits and probabilities, of several also their disagreement.

    Logits z = mean_m z_m; probabilities p = softmax(z / T). Several members also say the entropy of p in nats, the
    mutual information H(mean_m p_m) - mean_m H(p_m) between class and member (Depeweg et al., ICML 2018, Eq. 5), and
    the share of the members whose first choice is the ensemble's: as in `qtdog predict`. In a cascade the means are
    over the members that were asked.

    Args:
        temperature: T.
        accept_threshold: smallest probability of an answer that is accepted; None for no such output.

    Shapes:
        (n, members, n_classes) and, for a cascade, members asked (n,) → logits and probabilities (n, n_classes), each
        disagreement (n,), and with a threshold whether the answer is accepted, bool (n,)

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> together = AnswerHead()(logits)
        >>> alone = AnswerHead()(logits, torch.tensor([1]))
        >>> [output.tolist() for output in (together[0], alone[0], together[4], alone[4])]
        [[[1.0, 1.0]], [[2.0, 0.0]], [0.5], [1.0]]
    """

    def __init__(self, temperature: float = 1.0, accept_threshold: float | None = None) -> None:
        super().__init__()
        self.temperature, self.accept_threshold = temperature, accept_threshold

    def forward(self, each: Tensor, asked: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return logits and probabilities, of several members their disagreement, and what a threshold accepts."""
        answers = self._answers(each, asked)
        if self.accept_threshold is None:
            return answers
        return *answers, answers[1].amax(1) >= self.accept_threshold

    def _answers(self, each: Tensor, asked: Tensor | None) -> tuple[Tensor, ...]:
        if each.shape[1] == 1:
            logits = each[:, 0]
            return logits, (logits / self.temperature).softmax(1)
        mean = _Mean(each, asked)
        logits = mean(each)
        log_p = (logits / self.temperature).log_softmax(1)
        log_each = (each / self.temperature).log_softmax(2)
        mixture = mean(log_each.exp())
        # the smallest normal number stands in for 0, where the limit of p log p is 0
        whole = -(mixture * mixture.clamp(min=torch.finfo(torch.float32).tiny).log()).sum(1)
        disagreement = (whole - mean(_entropy(log_each)[:, :, None])[:, 0]).clamp(min=0)
        agrees = (each.argmax(2) == logits.argmax(1, keepdim=True)).to(torch.float32)
        return logits, log_p.exp(), _entropy(log_p), disagreement, mean(agrees[:, :, None])[:, 0]


class _Mean:
    """The mean over the members that were asked, (n, members, k) → (n, k)."""

    def __init__(self, each: Tensor, asked: Tensor | None) -> None:
        self.mask: Tensor | None = None
        self.counts: Tensor | int = each.shape[1]
        if asked is not None:
            places = torch.arange(each.shape[1], device=each.device)
            self.mask = (places[None, :, None] < asked[:, None, None]).to(each.dtype)
            self.counts = asked[:, None].to(each.dtype)

    def __call__(self, values: Tensor) -> Tensor:
        return (values if self.mask is None else values * self.mask).sum(1) / self.counts


class Settled(nn.Module):
    """Whether images need no further member of a cascade: `ensemble.cascade.is_settled` as a module.

    Args:
        temperature: T.
        threshold: a probability.

    Shapes:
        logits of the members asked so far (n, members, n_classes) → bool (n,)

    Example:
        >>> Settled(1.0, 0.9)(torch.tensor([[[9.0, 0.0]], [[0.1, 0.0]]]))
        tensor([ True, False])
    """

    def __init__(self, temperature: float, threshold: float) -> None:
        super().__init__()
        self.temperature, self.threshold = temperature, threshold

    def forward(self, each: Tensor) -> Tensor:
        """Return which images are settled."""
        return is_settled(each.transpose(0, 1), self.temperature, self.threshold)


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
ASKED = "members"
"""Name of the output that a cascade has besides."""


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

    With a threshold it is a cascade: members are asked one after another, each only about the images that the ones
    before have not settled (`ensemble.cascade`), and the number of members that were asked is one more output.

    Args:
        networks: the members, dequantized.
        preprocessing: their preprocessing.
        temperature: of the probabilities.
        threshold: confidence at which no further member is asked; None to ask all.
        accept_threshold: smallest probability of an answer that is accepted, or None.

    Shapes:
        uint8 (n, H, W, C) → logits and probabilities (n, n_classes), each disagreement, accept and members (n,)

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
        threshold: float | None = None,
        *,
        accept_threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(networks)
        self.prepare = Prepare(preprocessing)
        self.answer = AnswerHead(temperature, accept_threshold)
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
        n_members, temperature = len(self.members), self.answer.temperature
        groups = run_cascade(
            lambda index, part: self.members[index](part),
            n_members,
            inputs,
            threshold=threshold,
            temperature=temperature,
        )
        n_classes = groups[0].logits.shape[2] if groups else 0
        logits = torch.zeros(len(inputs), n_members, n_classes, device=inputs.device)
        asked = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        for group in groups:
            n_asked = len(group.logits)
            logits[group.indices, :n_asked] = group.logits.transpose(0, 1)
            asked[group.indices] = n_asked
        return logits, asked
