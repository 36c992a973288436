"""OBC against the exhaustive optimum, and the blocked computation against the algorithm as it is written."""

import itertools

import pytest
import torch
from torch import Tensor

from qtdog.core.errors import ConfigError, Interrupted
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers import obc as obc_module
from qtdog.quantizers.obc import obc
from qtdog.quantizers.ptq import row_errors


def problem(n_rows: int, n_columns: int, seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return rows of weights and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_columns, n_columns, generator=generator, dtype=torch.float64)
    inputs = mix @ torch.randn(n_columns, 4 * n_columns, generator=generator, dtype=torch.float64)
    rows = spread * torch.randn(n_rows, n_columns, generator=generator, dtype=torch.float64)
    return rows, (2 * inputs @ inputs.T)[None]


def literal(row: Tensor, hessian: Tensor, spec: QuantSpec, damping: float) -> list[int]:
    """The algorithm of the paper, one row, every elimination applied at once."""
    weights, codes = row.clone(), torch.full(row.shape, 99)
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(len(row)).double())
    for _ in range(len(row)):
        nearest = weights.round().clamp(spec.qmin, spec.qmax)
        error = weights - nearest
        cost = torch.where(error.abs() > 0.5, -error.abs(), error**2 / inverse.diagonal())
        p = int(torch.where(codes == 99, cost, torch.inf).argmin())
        codes[p] = int(nearest[p])
        weights = weights - error[p] / inverse[p, p] * inverse[:, p]
        inverse = inverse - torch.outer(inverse[:, p], inverse[p]) / inverse[p, p]
    return codes.tolist()


@pytest.mark.parametrize(("n_columns", "bits", "block"), [(90, 4, 64), (90, 2, 64), (40, 3, 7), (5, 8, 64)])
def test_the_blocked_computation_gives_the_codes_of_the_literal_one(n_columns, bits, block, monkeypatch):
    monkeypatch.setattr(obc_module, "BLOCK", block)
    monkeypatch.setattr(obc_module, "MEMORY_BYTES", 3 * 8 * n_columns**2)  # three rows together, so the last is alone
    rows, hessian = problem(4, n_columns, seed=bits)
    spec = QuantSpec(bits)
    codes = obc(rows, hessian, torch.ones(4), spec, damping=0.01)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [literal(row, hessian[0], spec, 0.01) for row in rows]


def test_each_group_of_rows_has_its_own_hessian(monkeypatch):
    monkeypatch.setattr(obc_module, "MEMORY_BYTES", 4 * 8 * 9**2)
    problems = [problem(2, 9, seed) for seed in range(3)]
    rows, hessians = (torch.cat(parts) for parts in zip(*problems, strict=True))
    codes = obc(rows, hessians, torch.ones(6), QuantSpec(3))
    expected = [obc(one, hessian, torch.ones(2), QuantSpec(3)) for one, hessian in problems]
    assert torch.equal(codes, torch.cat(expected))


def test_codes_do_not_depend_on_the_unit_of_the_weights():
    rows, hessian = problem(3, 12, seed=0)
    scale = torch.tensor([0.25, 4.0, 0.5])
    assert torch.equal(
        obc(rows * scale[:, None], hessian, scale, QuantSpec(4)), obc(rows, hessian, torch.ones(3), QuantSpec(4))
    )


@pytest.mark.parametrize(("n_columns", "bits", "spread"), [(6, 2, 0.9), (5, 3, 2.0), (3, 4, 4.0)])
def test_the_optimum_is_near_and_rounding_seldom_better(n_columns, bits, spread):
    spec = QuantSpec(bits)
    grid = torch.tensor(list(itertools.product(range(spec.qmin, spec.qmax + 1), repeat=n_columns)), dtype=torch.float64)
    totals, n_worse = torch.zeros(3, dtype=torch.float64), 0
    for seed in range(40):
        rows, hessian = problem(1, n_columns, seed, spread)
        found = row_errors(obc(rows, hessian, torch.ones(1), spec, damping=1e-9) - rows, hessian)
        rounded = row_errors(rows.round().clamp(spec.qmin, spec.qmax) - rows, hessian)
        best = row_errors(grid - rows, hessian).min()
        assert found >= best * (1 - 1e-9)
        n_worse += int(found > rounded)
        totals += torch.stack([best, found[0], rounded[0]])
    best, found, rounded = totals.tolist()
    assert found <= 1.6 * best <= 0.75 * rounded
    assert n_worse <= 4


def test_a_weight_beyond_the_grid_is_rounded_first_and_the_others_make_up_for_it():
    twins = torch.ones(1, 2, 2).double()
    codes = obc(torch.tensor([[0.1, 9.0]]), twins, torch.ones(1), QuantSpec(3), damping=1e-6)
    assert codes.tolist() == [[3, 3]]  # 9 → 3, and its twin takes over as much of the other 6 as the grid lets it


def test_an_input_that_is_always_zero_is_rounded_and_moves_nothing():
    rows, hessian = problem(2, 6, seed=1)
    alive = [0, 1, 3, 4, 5]
    hessian[:, 2] = hessian[:, :, 2] = 0
    codes = obc(rows, hessian, torch.ones(2), QuantSpec(8))
    mean = hessian[0].diagonal().mean()
    small = hessian[:, alive][:, :, alive]
    damping = 0.01 * mean / small[0].diagonal().mean()
    assert torch.equal(codes[:, alive], obc(rows[:, alive], small, torch.ones(2), QuantSpec(8), damping=damping.item()))
    assert torch.equal(codes[:, 2], rows[:, 2].round().to(torch.int8))


def test_inputs_that_are_too_much_alike_ask_for_more_damping():
    with pytest.raises(ConfigError, match=r"raise damping \(it is 1e-20\)"):
        obc(torch.zeros(1, 3), torch.ones(1, 3, 3).double(), torch.ones(1), QuantSpec(4), damping=1e-20)


def test_a_request_to_stop_is_heard_between_blocks(monkeypatch):
    monkeypatch.setattr(obc_module, "BLOCK", 4)
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise Interrupted("stop")

    rows, hessian = problem(1, 20, seed=0)
    with pytest.raises(Interrupted):
        obc(rows, hessian, torch.ones(1), QuantSpec(4), check=check)
