import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtdog.core.errors import ConfigError
from qtdog.ensemble.prediction import rejected, uncertainty, unknown_auroc
from qtdog.training.calibration import brier_score, expected_calibration_error, fit_temperature, risk_coverage


def in_float64(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entropy of the mean-logit softmax and mutual information, written out."""

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def h(p):
        return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)

    members = softmax(logits)
    return h(softmax(logits.mean(0))), h(members.mean(0)) - h(members).mean(0)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 5), st.floats(0.5, 3), st.integers(0, 1000))
def test_doubt_is_the_formula(members, n, n_classes, temperature, seed):
    logits = 4 * torch.randn(members, n, n_classes, generator=torch.Generator().manual_seed(seed))
    found = uncertainty(logits, temperature)
    entropy, information = in_float64(logits.double().numpy() / temperature)
    np.testing.assert_allclose(found.entropy.numpy(), entropy, atol=1e-5)
    np.testing.assert_allclose(found.mutual_information.numpy(), information.clip(0), atol=1e-5)
    choice = logits.mean(0).argmax(-1)
    expected = [(logits[:, i].argmax(-1) == choice[i]).float().mean().item() for i in range(n)]
    assert found.agreement.tolist() == pytest.approx(expected)
    if members == 1:
        assert found.mutual_information.abs().max() < 1e-5


def test_temperature_recovers_the_one_that_made_the_labels():
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(3 * true, labels) == pytest.approx(3, rel=0.03)
    before, after = (expected_calibration_error((3 * true / t).softmax(1), labels) for t in (1, 3))
    assert before > 0.05
    assert after < 0.02


def test_temperature_is_no_worse_than_any_on_a_grid():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(50, 4, generator=generator), torch.randint(0, 4, (50,), generator=generator)
    loss = lambda t: torch.nn.functional.cross_entropy(logits.double() / t, labels).item()  # noqa: E731
    best = min(loss(t) for t in np.exp(np.linspace(-3, 3, 400)))
    assert loss(fit_temperature(logits, labels)) <= best + 1e-6


@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 1000))
def test_calibration_error_and_brier_are_the_definitions(n, n_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)).softmax(1)
    labels = torch.randint(0, n_classes, (n,), generator=generator)
    confidence, choice = p.max(1)
    total = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            accuracy = (choice == labels)[inside].double().mean()
            total += inside.double().mean().item() * abs(accuracy - confidence[inside].mean()).item()
    assert expected_calibration_error(p, labels) == pytest.approx(total, abs=1e-9)
    truth = torch.eye(n_classes, dtype=torch.float64)[labels]
    assert brier_score(p, labels) == pytest.approx(((p - truth) ** 2).sum().item() / n)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=1, max_size=20))
def test_risk_at_each_coverage_is_the_error_of_the_images_that_sure(pairs):
    values, correct = (np.array(column) for column in zip(*pairs, strict=True))
    curve = risk_coverage(values, correct)
    for i, value in enumerate(sorted(values)):
        assert curve.risk[i] == pytest.approx(1 - correct[values <= value].mean())
    assert curve.risk_at(1.0) == pytest.approx(1 - correct.mean())


@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 99))
def test_rejection_takes_the_least_certain(n, frac, seed):
    values = np.random.default_rng(seed).random(n)
    mask = rejected(values, frac)
    assert mask.sum() == math.floor(frac * n + 1e-9)
    if mask.any() and not mask.all():
        assert values[mask].min() > values[~mask].max()


def test_auroc_counts_ordered_pairs():
    rng = np.random.default_rng(0)
    known, unknown = rng.random(30), rng.random(20) + 0.3
    pairs = [(b > a) + 0.5 * (b == a) for a in known for b in unknown]
    assert unknown_auroc(known, unknown) == pytest.approx(np.mean(pairs))


def test_mistakes():
    with pytest.raises(ConfigError, match="below 1, not 1"):
        rejected([0.1], 1.0)
    with pytest.raises(ConfigError, match="one folder gave none"):
        unknown_auroc([], [0.5])
    with pytest.raises(ConfigError, match="no images"):
        risk_coverage([], [])
