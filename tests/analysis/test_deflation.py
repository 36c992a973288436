"""The trace with large eigenvalues taken out, against matrices of known spectrum."""

import pytest
import torch

from qtdog.analysis.hessian import HessianProduct, deflated_trace, overlaps, top_eigenvalues, vector_products

N = 200


def bowl(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w and a Hessian of three large eigenvalues, many small ones and a negative one, as networks have."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))[0]
    values = torch.cat([torch.tensor([400.0, 60.0, 30.0, -5.0]), torch.rand(N - 4, generator=generator)]).double()
    return torch.zeros(N, dtype=torch.float64, requires_grad=True), basis @ values.diag() @ basis.T


def losses(w: torch.Tensor, hessian: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
    return [(w @ hessian @ w / 2, 1.0)]


def test_the_trace_lies_within_its_error_bars_which_are_far_narrower_than_plain_ones():
    deviations = []
    for seed in range(25):
        w, hessian = bowl(seed)
        pairs = top_eigenvalues(HessianProduct([w], lambda w=w, h=hessian: losses(w, h)), 3)
        vectors = torch.stack([torch.from_numpy(pair.vector) for pair in pairs], 1)
        products = vector_products([w], losses(w, hessian), range(20), seed=seed).sum(1)
        squares = overlaps(vectors, [w], range(20), seed=seed)
        values = torch.tensor([pair.value for pair in pairs], dtype=torch.float64)
        trace, error = deflated_trace(products, squares, values)
        assert error < products.std().item() / 20**0.5 / 8
        deviations.append((trace - hessian.trace().item()) / error)
    table = torch.tensor(deviations)
    assert table.abs().max() < 4.5
    assert 0.5 < table.square().mean() < 2


@pytest.mark.parametrize("wrong", ["value", "vector"])
def test_the_mean_holds_for_eigenvalues_that_are_none(wrong):
    w, hessian = bowl(0)
    values, vectors = torch.linalg.eigh(hessian)
    value, vector = values[-1:] * (1.2 if wrong == "value" else 1), vectors[:, -1:]
    if wrong == "vector":
        vector = torch.nn.functional.normalize(vector + 0.02 * torch.randn(N, 1, dtype=torch.float64), dim=0)
    products = vector_products([w], losses(w, hessian), range(2000)).sum(1)
    trace, error = deflated_trace(products, overlaps(vector, [w], range(2000)), value)
    assert abs(trace - hessian.trace().item()) < 3.5 * error
    assert error < 0.03 * trace


def test_overlaps_are_of_the_vectors_that_the_products_are_made_with():
    vector = torch.nn.functional.normalize(torch.randn(6, 2, dtype=torch.float64), dim=0)
    leaves = [torch.zeros(2, 2, dtype=torch.float64, requires_grad=True), torch.zeros(2, dtype=torch.float64)]
    leaves[1].requires_grad_()
    joined = torch.cat([leaf.flatten() for leaf in leaves])
    squares = [(joined @ vector[:, k]).square() / 2 for k in range(2)]  # their Hessians are q qᵀ
    expected = torch.stack([vector_products(leaves, [(one, 1.0)], range(3, 7), seed=5).sum(1) for one in squares], 1)
    assert torch.allclose(overlaps(vector, leaves, range(3, 7), seed=5), expected, atol=1e-5)
