"""GPTQ: rounding one column after another, each error made good by the columns that are still to come."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.hessian_math import in_groups, inverse_hessian

BLOCK = 128  # columns whose effect on the rest is applied at once (section 3.3 of the paper)


def gptq(
    rows: Tensor,
    hessian: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return codes for the rows of a layer, found column by column in the order that they have.

    With H⁻¹ = Uᵀ U, U upper triangular: q_j = nearest(w_j), e = (w_j - q_j) / U_jj, and w_k -= e · U_jk for each k > j;
    all rows at once (Frantar et al., ICLR 2023, Algorithm 1). Computed in float64, in units of the step sizes.

    Args:
        rows: weights, shape (R, K).
        hessian: H = 2 X Xᵀ, float64, shape (G, K, K); R divisible by G.
        scale: positive step sizes, shape (R,).
        spec: bits and levels, uniform or symmetric.
        damping: added to the diagonal, as a share of its mean.
        check: called now and then; may raise to break off.

    Returns:
        Codes, int8, shape (R, K).

    Raises:
        ConfigError: H is singular and the damping too small to help.

    Example:
        >>> rows, twins = torch.tensor([[0.4, 0.4]]), torch.ones(1, 2, 2).double()
        >>> gptq(rows, twins, torch.ones(1), QuantSpec(4)).tolist()  # 0.4 + 0.4 is nearer to 1 than to 0
        [[0, 1]]
    """
    upper = torch.linalg.cholesky(inverse_hessian(hessian, damping), upper=True)
    left = in_groups(rows.double() / scale.double()[:, None], len(hessian))
    codes = torch.empty_like(left)
    for start in range(0, rows.shape[1], BLOCK):
        check()
        inside, after = slice(start, start + BLOCK), slice(start + BLOCK, None)
        block, errors = _block(left[:, :, inside].clone(), upper[:, inside, inside], spec)
        codes[:, :, inside] = block
        left[:, :, after] -= errors @ upper[:, inside, after]
    return codes.reshape(rows.shape).to(torch.int8)


def _block(left: Tensor, upper: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the codes of a block of columns and the errors that the columns after it must make good."""
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    for j in range(left.shape[2]):
        column = left[:, :, j]
        code = column.round().clamp_(spec.qmin, spec.qmax)
        error = (column - code) / upper[:, j, j, None]
        left[:, :, j + 1 :] -= error[:, :, None] * upper[:, None, j, j + 1 :]
        codes[:, :, j], errors[:, :, j] = code, error
    return codes, errors
