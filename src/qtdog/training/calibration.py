"""How far probabilities can be trusted: temperature, calibration error, risk and coverage, a threshold to abstain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from qtdog.core.errors import ConfigError
from qtdog.runs.statistics import share_interval

N_BINS = 15
# e^-3 … e^3: a network that needs more than 20 times cooler or hotter logits has no use for its probabilities
LOG_BOUND = 3.0


@dataclass(frozen=True)
class LabeledLogits:
    """Logits and labels of n images, on the CPU.

    Attributes:
        logits: of k models, shape (k, n, n_classes).
        labels: class indices, shape (n,).
    """

    logits: Tensor
    labels: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Return the images of all parts, one or more, as one."""
        return cls(torch.cat([part.logits for part in parts], 1), torch.cat([part.labels for part in parts]))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T > 0 that minimizes the cross-entropy of softmax(logits / T).

    Source: Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017, section 4.2. The loss is convex in 1/T,
    so that the search between e^-3 and e^3 finds its only minimum; accuracy does not change. To be fitted on held-out
    *source* images, never on the target. Where every answer is right, the loss falls with T without end: then it is 1.

    Args:
        logits: shape (n, n_classes).
        labels: class indices, shape (n,).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 4)
        >>> labels = torch.tensor([0, 0, 0, 1])  # right three times in four: the best odds are 3 to 1
        >>> round(fit_temperature(logits, labels), 3), round(2 / math.log(3), 3)
        (1.82, 1.82)
    """
    from scipy.optimize import minimize_scalar  # takes half a second, which most commands do not need

    values = logits.detach().double().cpu()
    classes = labels.cpu()
    if bool((values.argmax(1) == classes).all()):
        return 1.0

    def loss(log_temperature: float) -> float:
        return functional.cross_entropy(values / math.exp(log_temperature), classes).item()

    found = minimize_scalar(loss, bounds=(-LOG_BOUND, LOG_BOUND), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, n_bins: int = N_BINS) -> float:
    """Return Σ_b n_b/n · abs(accuracy_b - confidence_b) over bins of equal width of the first choice's probability.

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017, Eq. 3. Bin b holds confidences in (b/B, (b+1)/B]. The
    estimate is biased upwards for few images.

    Args:
        probabilities: shape (n, n_classes).
        labels: shape (n,).
        n_bins: B.

    Example:
        >>> sure = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
        >>> round(expected_calibration_error(sure, torch.tensor([0, 1])), 3)  # 90 % sure, right half of the time
        0.4
    """
    confidence, choice = probabilities.double().max(1)
    correct = (choice == labels).double()
    bins = (confidence * n_bins).ceil().long().sub(1).clamp(0, n_bins - 1)
    gaps = torch.zeros(n_bins, dtype=torch.float64, device=bins.device)
    gaps.index_add_(0, bins, correct - confidence)
    return (gaps.abs().sum() / len(labels)).item()


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean over images of Σ_c (p_c - 1[c = label])²: 0 is perfect, 2 is the worst (Brier, 1950).

    Args:
        probabilities: shape (n, n_classes).
        labels: shape (n,).

    Example:
        >>> brier_score(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 1]))
        0.25
    """
    truth = functional.one_hot(labels, probabilities.shape[1])
    return (probabilities.double() - truth).square().sum(1).mean().item()


Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RiskCoverage:
    """Error among the answered images when only the surest are answered.

    Attributes:
        coverage: share answered, rising to 1, shape (n,).
        risk: share of wrong answers among them, (n,).
        area: mean risk over all coverages (AURC); lower is better.
    """

    coverage: Floats
    risk: Floats
    area: float

    def risk_at(self, coverage: float) -> float:
        """Return the risk when at least this share of the images is answered."""
        return float(self.risk[int(np.searchsorted(self.coverage, coverage - 1e-12))])


def risk_coverage(uncertainties: npt.ArrayLike, correct: npt.ArrayLike) -> RiskCoverage:
    """Return the risk-coverage curve (El-Yaniv and Wiener, JMLR 2010; area as in Geifman et al., ICLR 2019).

    Images of equal uncertainty are answered together: each of them gets the risk at the end of its group.

    Args:
        uncertainties: higher is less sure, shape (n,).
        correct: whether each answer is right, shape (n,).

    Raises:
        ConfigError: there are no images.

    Example:
        >>> curve = risk_coverage([0.1, 0.2, 0.9, 0.8], [True, True, False, True])
        >>> curve.risk.tolist(), curve.risk_at(0.75)
        ([0.0, 0.0, 0.0, 0.25], 0.0)
    """
    values, right = np.asarray(uncertainties, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if not len(values):
        raise ConfigError("there are no images to draw a risk-coverage curve of")
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    answered = np.arange(1, len(values) + 1)
    wrong = np.cumsum(1 - right[order])
    ends = np.searchsorted(ranked, ranked, side="right") - 1
    risk = (wrong / answered)[ends]
    return RiskCoverage(answered / len(values), risk, float(risk.mean()))


COVERAGES = [round(0.05 * k, 2) for k in range(1, 21)]  # of the curve that is kept
KEPT_COVERAGE = 0.9  # of the risk that is reported: the least certain tenth is not answered


@dataclass(frozen=True)
class Reliability:
    """How far the probabilities of predictions can be trusted, from labeled images.

    Attributes:
        ece: expected calibration error, 15 bins of equal width.
        brier: Brier score, 0 … 2.
        aurc: area under the risk-coverage curve, by entropy.
        risk_at_90: share of wrong answers among the surest 90 %.
    """

    ece: float
    brier: float
    aurc: float
    risk_at_90: float


def measure_reliability(probabilities: Tensor, entropy: Tensor, labels: Tensor) -> Reliability:
    """Return how far predictions can be trusted.

    Args:
        probabilities: shape (n, n_classes).
        entropy: the uncertainty that orders the images, (n,).
        labels: class indices, (n,).

    Raises:
        ConfigError: there are no images.
    """
    if not len(labels):
        raise ConfigError("there are no labeled images to compare the probabilities with")
    correct = probabilities.argmax(1) == labels
    curve = risk_coverage(entropy.cpu().numpy(), correct.cpu().numpy())
    return Reliability(
        ece=expected_calibration_error(probabilities, labels),
        brier=brier_score(probabilities, labels),
        aurc=curve.area,
        risk_at_90=curve.risk_at(KEPT_COVERAGE),
    )


@dataclass(frozen=True)
class Acceptance:
    """What a threshold of confidence does on labeled images.

    Attributes:
        n: images.
        coverage: share that is answered, which is those whose first choice has at least that probability.
        error: share of wrong answers among them; 0 if none is answered.
        interval: 95 % interval of the error (Wilson); None if none is answered.
    """

    n: int
    coverage: float
    error: float
    interval: list[float] | None


def choose_accept_threshold(confidence: Tensor, abstain: float) -> float:
    """Return the largest threshold of confidence that abstains on at most a share of the images.

    An image is answered if its confidence, the probability of its first choice, reaches the threshold. It is chosen by
    the order of the confidences alone (Geifman and El-Yaniv, NIPS 2017); what it costs in errors is measured after.

    Args:
        confidence: of held-out source images, shape (n,), at least one.
        abstain: the share, 0 ≤ abstain < 1.

    Example:
        >>> choose_accept_threshold(torch.tensor([0.5, 0.9, 0.75, 1.0]), 0.25)
        0.75
    """
    ranked = confidence.double().sort().values
    return float(ranked[int(abstain * len(ranked) + 1e-9)])


def measure_acceptance(confidence: Tensor, correct: Tensor, threshold: float) -> Acceptance:
    """Return what a threshold of confidence does on labeled images.

    Args:
        confidence: shape (n,).
        correct: whether each first choice is right, (n,).
        threshold: smallest confidence that is answered.

    Example:
        >>> found = measure_acceptance(torch.tensor([0.5, 0.9, 0.8]), torch.tensor([False, True, False]), 0.8)
        >>> round(found.coverage, 3), found.error
        (0.667, 0.5)
    """
    answered = confidence.double() >= threshold
    n_answered = int(answered.sum())
    n_wrong = int((answered & ~correct).sum())
    if not n_answered:
        return Acceptance(len(confidence), 0.0, 0.0, None)
    error = n_wrong / n_answered
    return Acceptance(len(confidence), n_answered / len(confidence), error, list(share_interval(error, n_answered)))


@dataclass(frozen=True)
class AnswerCalibration:
    """The temperature and the threshold of a model, and what they do.

    Attributes:
        temperature: of the probabilities, fitted on held-out source images; 1 without any.
        accept_threshold: smallest probability of an answer that is accepted, chosen on the same images; None without.
        report: by "source" and "test", where there are such images: reliability `before` and `after`; `risk_coverage`,
            pairs of the share that is answered, the most confident first, and the errors among them; and `accept`.
    """

    temperature: float
    accept_threshold: float | None
    report: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return what `result.json` says."""
        return {"temperature": self.temperature, "accept_threshold": self.accept_threshold} | self.report


def calibrate_answers(source: LabeledLogits | None, test: LabeledLogits | None, abstain: float) -> AnswerCalibration:
    """Return temperature and threshold of a model, fitted on held-out source images; test images are only measured.

    Args:
        source: logits (members, n, n_classes) and labels of held-out source images; None without any.
        test: the same of test images.
        abstain: share of the source images that need not be answered.

    Example:
        >>> right = LabeledLogits(torch.tensor([[[2.0, 0.0]] * 4]), torch.tensor([0, 0, 0, 1]))
        >>> found = calibrate_answers(right, None, 0.1)
        >>> round(found.temperature, 2), round(found.accept_threshold, 2), found.report["source"]["accept"]["error"]
        (1.82, 0.75, 0.25)
    """
    temperature = 1.0 if source is None else fit_temperature(source.logits.mean(0), source.labels)
    threshold = None
    report: dict[str, Any] = {}
    for name, images in (("source", source), ("test", test)):
        if images is None:
            continue
        logits = images.logits.mean(0)
        before, after = logits.softmax(1), (logits / temperature).softmax(1)
        best = after.max(1)
        if name == "source":
            threshold = choose_accept_threshold(best.values, abstain)
        report[name] = {
            when: asdict(measure_reliability(found, torch.special.entr(found).sum(1), images.labels))
            for when, found in (("before", before), ("after", after))
        }
        curve = risk_coverage(-best.values.double().numpy(), (best.indices == images.labels).numpy())
        report[name]["risk_coverage"] = [[share, curve.risk_at(share)] for share in COVERAGES]
        if threshold is not None:
            accept = measure_acceptance(best.values, best.indices == images.labels, threshold)
            report[name]["accept"] = asdict(accept)
    return AnswerCalibration(temperature, threshold, report)
