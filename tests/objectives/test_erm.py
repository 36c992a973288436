import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtdog.objectives.base import DomainOutputs
from qtdog.objectives.erm import erm_loss


def in_float64(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-log_probability[np.arange(len(labels)), labels].mean())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(2, 7), st.integers(0, 1000))
def test_erm_is_the_mean_over_all_images(sizes, n_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    domains = []
    for n in sizes:
        logits = 3 * torch.randn(n, n_classes, generator=generator)
        labels = torch.randint(0, n_classes, (n,), generator=generator)
        domains.append(DomainOutputs(torch.zeros(n, 1), logits, labels))
    expected = in_float64(
        torch.cat([domain.logits for domain in domains]).double().numpy(),
        torch.cat([domain.labels for domain in domains]).numpy(),
    )
    assert abs(erm_loss(domains).item() - expected) < 1e-5 * max(1, expected)


def test_gradient_is_softmax_minus_one_hot():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([1, 2])
    erm_loss([DomainOutputs(logits, logits, labels)]).backward()
    expected = (logits.detach().softmax(1) - torch.eye(3)[labels]) / 2
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected)
