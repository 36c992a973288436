"""The quadratic problem of one layer: what rounding its weights does to its outputs, and the inverse that repairs it.

A layer computes Y = W X, with rows of weights W (R, K) and one column of X (K, N) per position. Changing W by D changes
the outputs by ‖D X‖² = tr(D H Dᵀ) / 2 with H = 2 X Xᵀ (Frantar et al., "Optimal Brain Compression", NeurIPS 2022,
section 3). Rows do not interact. A convolution in G groups has an H for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtdog.core.errors import ConfigError


def row_errors(change: Tensor, hessian: Tensor) -> Tensor:
    """Return d H dᵀ of each row d, in float64: twice the squared change of the layer's outputs.

    Args:
        change: difference of two weights, shape (R, K).
        hessian: float64, shape (G, K, K) with R divisible by G; rows 0 … R/G - 1 belong to the first group.

    Returns:
        Errors, shape (R,).

    Example:
        >>> row_errors(torch.tensor([[1.0, 2.0]]), torch.eye(2, dtype=torch.float64)[None]).tolist()
        [5.0]
    """
    grouped = in_groups(change.double(), len(hessian))
    return torch.einsum("grk,grk->gr", grouped @ hessian, grouped).reshape(-1)


def relative_error(change: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """Return tr(D H Dᵀ) / tr(W H Wᵀ): the error of a layer's outputs as a share of their energy; 0 if they are zero.

    Args:
        change: D, shape (R, K).
        weight: W, shape (R, K).
        hessian: float64, shape (G, K, K).

    Example:
        >>> relative_error(torch.tensor([[0.1, 0.0]]), torch.tensor([[1.0, 7.0]]), torch.ones(1, 2, 2).double())
        0.00015625...
    """
    energy = row_errors(weight, hessian).sum().item()
    return row_errors(change, hessian).sum().item() / energy if energy > 0 else 0.0


def inverse_hessian(hessian: Tensor, damping: float) -> Tensor:
    """Return (H + damping · mean(diag H) · I)⁻¹ for each group; the identity for a group that never saw an input.

    An input that is always zero keeps just the damping on its diagonal: its weights are rounded, and move nothing else.

    Args:
        hessian: float64, shape (G, K, K).
        damping: share of the mean diagonal.

    Returns:
        Float64, shape (G, K, K).

    Raises:
        ConfigError: H is singular and the damping too small to help.

    Example:
        >>> inverse_hessian(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]).double(), 0.5).diagonal(dim1=1, dim2=2)
        tensor([[0.2500, 0.5000]], dtype=torch.float64)
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True)
    damped = hessian.clone()
    damped.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, damping * mean, 1.0))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.any():
        raise ConfigError(f"the inputs are too much alike to invert their Hessian; raise damping (it is {damping:g})")
    return torch.cholesky_inverse(factor)


def in_groups(rows: Tensor, n_groups: int) -> Tensor:
    """Return rows (R, K) as (G, R / G, K).

    Example:
        >>> in_groups(torch.zeros(6, 4), 3).shape
        torch.Size([3, 2, 4])
    """
    return rows.reshape(n_groups, -1, rows.shape[1])
