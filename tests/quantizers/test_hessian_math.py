import torch

from qtdog.quantizers.ptq import inverse_hessian, relative_error, row_errors


def layer(n_groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs (G, K, N), rows (G · 3, K) and a change of them."""
    generator = torch.Generator().manual_seed(n_groups)
    inputs = torch.randn(n_groups, 5, 20, generator=generator, dtype=torch.float64)
    rows, change = torch.randn(2, 3 * n_groups, 5, generator=generator, dtype=torch.float64)
    return inputs, rows, change


def test_errors_are_those_of_the_outputs():
    for n_groups in (1, 4):
        inputs, rows, change = layer(n_groups)
        hessian = 2 * inputs @ inputs.mT
        outputs, changed = (w.reshape(n_groups, 3, 5) @ inputs for w in (rows, change))
        torch.testing.assert_close(row_errors(change, hessian), 2 * changed.square().sum(2).reshape(-1))
        expected = (changed.square().sum() / outputs.square().sum()).item()
        assert abs(relative_error(change, rows, hessian) / expected - 1) < 1e-12


def test_the_relative_error_is_the_ratio_of_traces():
    inputs, rows, change = layer(1)
    hessian = 2 * inputs[0] @ inputs[0].T
    expected = torch.trace(change @ hessian @ change.T) / torch.trace(rows @ hessian @ rows.T)
    assert abs(relative_error(change, rows, hessian[None]) - expected.item()) < 1e-12
    assert relative_error(change, rows, torch.zeros(1, 5, 5).double()) == 0


def test_the_inverse_is_that_of_the_damped_hessian_group_by_group():
    inputs, _, _ = layer(4)
    hessian = 2 * inputs @ inputs.mT
    hessian[2] = 0  # a group that never saw an input
    inverse = inverse_hessian(hessian, 0.1)
    for group in (0, 1, 3):
        damped = hessian[group] + 0.1 * hessian[group].diagonal().mean() * torch.eye(5).double()
        torch.testing.assert_close(inverse[group] @ damped, torch.eye(5).double())
    assert torch.equal(inverse[2], torch.eye(5).double())
