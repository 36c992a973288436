"""GPTQ against the algorithm as it is written, and both methods where there is nothing to repair."""

import pytest
import torch
from torch import Tensor

from qtdog.core.errors import ConfigError, Interrupted
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import encode
from qtdog.quantizers.obc import obc
from qtdog.quantizers.ptq import gptq, row_errors


def problem(n_rows: int, n_columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_columns, n_columns, generator=generator, dtype=torch.float64)
    inputs = mix @ torch.randn(n_columns, 2 * n_columns, generator=generator, dtype=torch.float64)
    return 2 * torch.randn(n_rows, n_columns, generator=generator), (2 * inputs @ inputs.T)[None]


def literal(rows: Tensor, hessian: Tensor, spec: QuantSpec, damping: float) -> Tensor:
    """OBC's update in a fixed order, with an inverse from which each column is removed: no Cholesky, no blocks."""
    weights, codes = rows.double(), torch.zeros_like(rows)
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double())
    for j in range(rows.shape[1]):
        codes[:, j] = weights[:, j].round().clamp(spec.qmin, spec.qmax)
        error = (weights[:, j] - codes[:, j]) / inverse[j, j]
        weights = weights - torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes.to(torch.int8)


@pytest.mark.parametrize(("n_columns", "bits"), [(150, 4), (129, 2), (7, 8)])
def test_codes_are_those_of_the_literal_computation(n_columns, bits):
    rows, hessian = problem(5, n_columns, seed=bits)
    codes = gptq(rows, hessian, torch.ones(5), QuantSpec(bits), damping=0.05)
    assert torch.equal(codes, literal(rows, hessian[0], QuantSpec(bits), 0.05))


def test_each_group_of_rows_has_its_own_hessian():
    problems = [problem(2, 9, seed) for seed in range(3)]
    rows, hessians = (torch.cat(parts) for parts in zip(*problems, strict=True))
    expected = [gptq(one, hessian, torch.ones(2), QuantSpec(3)) for one, hessian in problems]
    assert torch.equal(gptq(rows, hessians, torch.ones(6), QuantSpec(3)), torch.cat(expected))


@pytest.mark.parametrize("method", [gptq, obc])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("levels", ["uniform", "symmetric"])
def test_inputs_that_do_not_go_together_leave_nothing_to_repair(method, bits, levels):
    """With a diagonal Hessian, or none at all, both are rounding to nearest."""
    spec = QuantSpec(bits, levels=levels)
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(6, 10, generator=generator)
    scale = torch.rand(6, generator=generator) * 0.3 + 0.05
    expected = encode(rows, scale, spec).codes
    diagonal = torch.rand(10, generator=generator).double() + 0.1
    assert torch.equal(method(rows, torch.diag(diagonal)[None], scale, spec), expected)
    assert torch.equal(method(rows, torch.zeros(3, 10, 10).double(), scale, spec), expected)


@pytest.mark.parametrize("method", [gptq, obc])
@pytest.mark.parametrize("bits", range(2, 9))
def test_errors_are_repaired_at_every_width(method, bits):
    rows, hessian = problem(16, 40, seed=9)
    spec, scale = QuantSpec(bits), torch.full((16,), 14 / 2**bits)
    codes = method(rows, hessian, scale, spec)
    assert spec.qmin <= codes.min() <= codes.max() <= spec.qmax
    found, rounded = (
        row_errors(c * scale[:, None] - rows, hessian).sum() for c in (codes, encode(rows, scale, spec).codes)
    )
    assert found < 0.6 * rounded


def test_inputs_that_are_too_much_alike_ask_for_more_damping():
    with pytest.raises(ConfigError, match="raise damping"):
        gptq(torch.zeros(1, 3), torch.ones(1, 3, 3).double(), torch.ones(1), QuantSpec(4), damping=1e-20)


def test_a_request_to_stop_is_heard():
    def check() -> None:
        raise Interrupted("stop")

    with pytest.raises(Interrupted):
        gptq(torch.zeros(1, 3), torch.zeros(1, 3, 3).double(), torch.ones(1), QuantSpec(4), check=check)
