from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn import functional

from qtdog.analysis.hessian import block_traces, mean_losses


def test_a_quadratic_with_a_known_hessian_is_met_within_the_error_bars():
    torch.manual_seed(0)
    root = torch.randn(10, 10, dtype=torch.float64)
    hessian = root @ root.T
    w = {"a": torch.randn(2, 2, dtype=torch.float64), "b": torch.randn(6, dtype=torch.float64)}
    leaves = {name: value.requires_grad_() for name, value in w.items()}
    expected = {"a": hessian.diagonal()[:4].sum().item(), "b": hessian.diagonal()[4:].sum().item()}
    deviations = []
    for seed in range(30):
        joined = torch.cat([leaf.flatten() for leaf in leaves.values()])
        found = block_traces(leaves, [(joined @ hessian @ joined / 2, 1.0)], n_vectors=40, seed=seed)
        deviations.append([(found[name].trace - expected[name]) / found[name].standard_error for name in leaves])
    table = torch.tensor(deviations)
    assert table.abs().max() < 4
    assert ((table.square().mean(0) > 0.5) & (table.square().mean(0) < 1.8)).all()


def test_without_interaction_one_vector_is_exact():
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    found = block_traces({"a": a, "b": b}, [((a**3).sum() + 2 * (b**2).sum(), 0.5)], n_vectors=2)
    assert found["a"].trace == pytest.approx(9)
    assert found["b"].trace == pytest.approx(4)
    assert (found["a"].standard_error, found["b"].mean) == (0, pytest.approx(2))


class Tiny(nn.Module):
    """A network with attention, small enough for its whole Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.embed(images))
        return self.head(functional.scaled_dot_product_attention(hidden, hidden, hidden).mean(1))


def test_a_network_is_met_against_its_whole_hessian():
    torch.manual_seed(1)
    network, images, labels = Tiny(), torch.randn(12, 5, 3), torch.arange(12) % 3
    names = [name for name, _ in network.named_parameters()]
    values = tuple(p.detach() for p in network.parameters())

    def loss(*parameters: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(network, dict(zip(names, parameters, strict=True)), (images,))
        return functional.cross_entropy(outputs, labels)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        rows = torch.autograd.functional.hessian(loss, values)
    sizes = [value.numel() for value in values]
    exact = [rows[i][i].reshape(size, size).trace().item() for i, size in enumerate(sizes)]
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    found = block_traces(dict(network.named_parameters()), mean_losses(network, batches, 12), n_vectors=400)
    assert [block.n_weights for block in found.values()] == sizes
    for name, expected in zip(names, exact, strict=True):
        assert abs(found[name].trace - expected) < 4 * found[name].standard_error + 1e-6, name
        assert found[name].standard_error < 0.5 * max(map(abs, exact))


def test_losses_of_several_domains_weigh_alike():
    w = torch.ones(1, requires_grad=True)
    domains = [[(3 * w**2).sum()], [(w**2).sum(), (w**2).sum()]]
    pairs = chain.from_iterable([(loss, 1 / len(part) / 2) for loss in part] for part in domains)
    assert block_traces({"w": w}, pairs, n_vectors=2)["w"].trace == pytest.approx((6 + 2) / 2)


def test_the_mode_is_put_back_and_batch_norm_is_not_touched():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    batches = [(torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, 0]))]
    block_traces(dict(network.named_parameters()), mean_losses(network, batches, 4), n_vectors=2)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_loss_without_curvature_and_one_that_does_not_reach_a_block():
    w, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert block_traces({"w": w}, [(w.sum(), 1.0)], n_vectors=2)["w"].trace == 0
    found = block_traces({"w": w, "other": other}, [((w**2).sum(), 1.0)], n_vectors=2)
    assert (found["w"].trace, found["other"].trace) == (4, 0)


def test_one_vector_has_no_spread():
    with pytest.raises(ValueError, match="at least 2"):
        block_traces({}, [], n_vectors=1)
