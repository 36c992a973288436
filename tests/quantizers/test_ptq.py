"""GPTQ and OBC against the algorithms as they are written, and the exhaustive optimum; Hessians."""

import itertools

import pytest
import torch
from torch import Tensor

from qtdog.core.errors import ConfigError, Interrupted
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers import ptq as obc_module
from qtdog.quantizers.base import encode
from qtdog.quantizers.ptq import gptq, inverse_hessian, obc, relative_error, row_errors


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


def obc_problem(n_rows: int, n_columns: int, seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return rows of weights and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_columns, n_columns, generator=generator, dtype=torch.float64)
    inputs = mix @ torch.randn(n_columns, 4 * n_columns, generator=generator, dtype=torch.float64)
    rows = spread * torch.randn(n_rows, n_columns, generator=generator, dtype=torch.float64)
    return rows, (2 * inputs @ inputs.T)[None]


def literal_obc(row: Tensor, hessian: Tensor, spec: QuantSpec, damping: float) -> list[int]:
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
    monkeypatch.setattr(obc_module, "N_PENDING", block)
    monkeypatch.setattr(obc_module, "MEMORY_BYTES", 3 * 8 * n_columns**2)  # three rows together, so the last is alone
    rows, hessian = obc_problem(4, n_columns, seed=bits)
    spec = QuantSpec(bits)
    codes = obc(rows, hessian, torch.ones(4), spec, damping=0.01)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [literal_obc(row, hessian[0], spec, 0.01) for row in rows]


def test_obc_gives_each_group_of_rows_its_own_hessian(monkeypatch):
    monkeypatch.setattr(obc_module, "MEMORY_BYTES", 4 * 8 * 9**2)
    problems = [obc_problem(2, 9, seed) for seed in range(3)]
    rows, hessians = (torch.cat(parts) for parts in zip(*problems, strict=True))
    codes = obc(rows, hessians, torch.ones(6), QuantSpec(3))
    expected = [obc(one, hessian, torch.ones(2), QuantSpec(3)) for one, hessian in problems]
    assert torch.equal(codes, torch.cat(expected))


def test_codes_do_not_depend_on_the_unit_of_the_weights():
    rows, hessian = obc_problem(3, 12, seed=0)
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
        rows, hessian = obc_problem(1, n_columns, seed, spread)
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
    rows, hessian = obc_problem(2, 6, seed=1)
    alive = [0, 1, 3, 4, 5]
    hessian[:, 2] = hessian[:, :, 2] = 0
    codes = obc(rows, hessian, torch.ones(2), QuantSpec(8))
    mean = hessian[0].diagonal().mean()
    small = hessian[:, alive][:, :, alive]
    damping = 0.01 * mean / small[0].diagonal().mean()
    assert torch.equal(codes[:, alive], obc(rows[:, alive], small, torch.ones(2), QuantSpec(8), damping=damping.item()))
    assert torch.equal(codes[:, 2], rows[:, 2].round().to(torch.int8))


def test_obc_asks_for_more_damping_where_inputs_are_too_much_alike():
    with pytest.raises(ConfigError, match=r"raise damping \(it is 1e-20\)"):
        obc(torch.zeros(1, 3), torch.ones(1, 3, 3).double(), torch.ones(1), QuantSpec(4), damping=1e-20)


def test_a_request_to_stop_is_heard_between_blocks(monkeypatch):
    monkeypatch.setattr(obc_module, "N_PENDING", 4)
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise Interrupted("stop")

    rows, hessian = obc_problem(1, 20, seed=0)
    with pytest.raises(Interrupted):
        obc(rows, hessian, torch.ones(1), QuantSpec(4), check=check)


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
