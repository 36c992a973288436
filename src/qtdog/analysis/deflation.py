"""The trace of a matrix whose few large eigenvalues are known: random vectors have to find only the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qtdog.analysis.hessian_trace import rademacher


def overlaps(vectors: Tensor, leaves: Sequence[Tensor], numbers: Sequence[int], *, seed: int = 0) -> Tensor:
    """Return (q_i · v_n)² of each random vector of `hessian_trace.vector_products`, float64 (vectors, k).

    Args:
        vectors: q_i of unit length over all leaves joined, shape (n_weights, k).
        leaves: the blocks.
        numbers: of the random vectors.
        seed: of the random vectors.

    Example:
        >>> w = torch.zeros(2)
        >>> overlaps(torch.tensor([[1.0], [0.0]]), [w], range(3)).tolist()
        [[1.0], [1.0], [1.0]]
    """
    known = vectors.to(leaves[0].device, torch.float32).T.contiguous()
    found = torch.empty(len(numbers), len(known), dtype=torch.float64)
    for row, n in enumerate(numbers):
        drawn = torch.cat([part.flatten() for part in rademacher(leaves, seed, n)]).float()
        found[row] = (known @ drawn).double().square().cpu()
    return found


def deflated_trace(products: Tensor, squares: Tensor, values: Tensor) -> tuple[float, float]:
    """Return tr H and its standard error from random vectors, with some eigenvalues taken out of the spread.

    tr H = Σ_i λ_i + E[vᵀ H v - Σ_i λ_i (q_i · v)²], because (q_i · v)² has the mean 1 for every q_i of unit length. For
    exact pairs this is Hutchinson's estimate of what H does at right angles to all q_i. For inexact ones the mean still
    holds; only the spread is larger.

    Source: Hutchinson, 1989; deflation as in Gambhir, Stathopoulos and Orginos, SIAM J. Sci. Comput. 2017, and Hutch++
    (Meyer, Musco, Musco and Woodruff, SOSA 2021).

    Args:
        products: vᵀ H v, float64 (vectors,); two vectors or more.
        squares: (q_i · v)², float64 (vectors, k); see `overlaps`.
        values: λ_i, float64 (k,).

    Example:
        >>> products = torch.tensor([4.0, 0.0])  # of H = 2 q qᵀ with q = (1, 1) / √2, and v = (1, 1) and (1, -1)
        >>> deflated_trace(products, torch.tensor([[2.0], [0.0]]), torch.tensor([2.0]))
        (2.0, 0.0)
    """
    rest = products - squares @ values
    return (values.sum() + rest.mean()).item(), rest.std().item() / math.sqrt(len(rest))
