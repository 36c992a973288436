"""Eigenvalues against a quadratic of known curvature, and against curvlinops' own Hessian."""

import builtins

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qtdog.analysis.hessian import HessianProduct, density, lanczos, mean_losses, top_eigenvalues, vector_products
from qtdog.core.errors import ModelError


@pytest.fixture
def bowl() -> tuple[HessianProduct, Tensor, list[Tensor]]:
    """Return ½ wᵀ H w over two blocks, and H."""
    torch.manual_seed(1)
    root = torch.randn(30, 30)
    matrix = root @ root.T / 30
    blocks = [torch.randn(4, 5, requires_grad=True), torch.randn(10, requires_grad=True)]

    def losses() -> list[tuple[Tensor, float]]:
        w = torch.cat([block.flatten() for block in blocks])
        return [(w @ matrix @ w / 4, 0.5), (w @ matrix @ w * 3 / 8, 1.0)]  # two batches: ¼ · ½ + ⅜ = ½

    return HessianProduct(blocks, losses), matrix, blocks


def test_the_product_is_the_matrix(bowl):
    product, matrix, _ = bowl
    vector = torch.randn(30)
    assert torch.allclose(product @ vector, matrix @ vector, atol=1e-5)


def test_the_largest_eigenvalues_are_found_within_their_residuals(bowl):
    product, matrix, _ = bowl
    exact = torch.linalg.eigvalsh(matrix).flip(0)[:3].tolist()
    found = top_eigenvalues(product, 3)
    for eigenvalue, true in zip(found, exact, strict=True):
        assert abs(eigenvalue.value - true) <= eigenvalue.residual + 1e-5
        assert eigenvalue.residual < 0.05 * true
    assert [e.value for e in found] == [e.value for e in top_eigenvalues(product, 3)]


def test_a_probe_has_the_moments_of_the_matrix_and_a_seed_gives_the_same(bowl):
    product, matrix, _ = bowl
    probes = [lanczos(product, 8, 0, n) for n in range(60)]
    assert all(sum(probe.weights) == pytest.approx(1, abs=1e-4) for probe in probes)
    means = np.array([np.dot(probe.values, probe.weights) for probe in probes])
    error = means.std(ddof=1) / np.sqrt(60)
    assert abs(means.mean() - matrix.trace().item() / 30) < 4 * error
    state = torch.random.get_rng_state()
    assert lanczos(product, 8, 0, 3) == probes[3] != lanczos(product, 8, 1, 3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_density_integrates_to_one_and_its_band_is_from_the_probes(bowl):
    product, _, _ = bowl
    grid = np.linspace(-3, 12, 2000)
    mean, error = density([lanczos(product, 8, 0, n) for n in range(4)], grid, 0.2)
    assert float(mean.sum()) * (grid[1] - grid[0]) == pytest.approx(1, abs=1e-3)
    assert (error >= 0).all()
    assert error.max() > 0


def test_a_loss_without_curvature_has_none():
    w = torch.ones(3, requires_grad=True)
    assert (HessianProduct([w], lambda: [(w.sum(), 1.0)]) @ torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.filterwarnings("ignore")  # of curvlinops and what it imports
def test_the_product_is_that_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).eval()
    batches = [(torch.randn(5, 1, 4, 4), torch.randint(3, (5,))), (torch.randn(3, 1, 4, 4), torch.randint(3, (3,)))]
    parameters = list(network.parameters())
    product = HessianProduct(parameters, lambda: mean_losses(network, batches, 8))
    theirs = curvlinops.HessianLinearOperator(network, nn.CrossEntropyLoss(), parameters, batches)
    vector = torch.randn(product.shape[0])
    assert torch.allclose(product @ vector, theirs @ vector, atol=1e-5)


def test_vectors_in_portions_are_those_of_one_go(bowl):
    _, _, blocks = bowl
    losses = [((blocks[0] ** 4).sum() + (blocks[1] ** 3).sum(), 1.0)]
    whole = vector_products(blocks, losses, range(4))
    losses = [((blocks[0] ** 4).sum() + (blocks[1] ** 3).sum(), 1.0)]
    assert torch.equal(vector_products(blocks, losses, [2, 3]), whole[2:])


def test_without_curvlinops_the_extra_is_named(bowl, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("curvlinops"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModelError, match=r"pip install 'qtdog\[curvature\]'"):
        lanczos(bowl[0], 3, 0, 0)
