"""OBC: rounding one weight after another, the cheapest one first, each error made good by the weights that are left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.ptq import inverse_hessian

MEMORY_BYTES = 2**29  # for the inverse Hessians of the rows that are worked on together
BLOCK = 64  # eliminations that are kept as factors before they are applied to the inverse Hessians
SHRINK = 0.75  # the inverse Hessians shrink to the weights that are left when these are at most such a share of them


def obc(
    rows: Tensor,
    hessian: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return codes for the rows of a layer, found greedily, weight by weight.

    In each row: take p = argmin (w_p - q_p)² / [H⁻¹]_pp with q_p the nearest point of the grid to w_p; then
    w -= (w_p - q_p) / [H⁻¹]_pp · H⁻¹_:p, and remove p from H⁻¹ by H⁻¹ -= H⁻¹_:p H⁻¹_p: / [H⁻¹]_pp. A weight beyond the
    grid by more than half a step goes first, the one furthest off before the others (Frantar et al., NeurIPS 2022,
    section 5). Computed in float64, in units of the step sizes; R · K³ operations.

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
        >>> rows, twins = torch.tensor([[0.4, 0.3]]), torch.ones(1, 2, 2).double()
        >>> obc(rows, twins, torch.ones(1), QuantSpec(4)).tolist()  # 0.3 is rounded first
        [[1, 0]]
    """
    inverse = inverse_hessian(hessian, damping)
    n_rows, n_columns = rows.shape
    n_together = max(1, MEMORY_BYTES // (8 * n_columns**2))
    left = rows.double() / scale.double()[:, None]
    group = torch.arange(n_rows, device=rows.device) // (n_rows // len(hessian))
    parts = zip(left.split(n_together), group.split(n_together), strict=True)
    return torch.cat(
        [_Elimination(part.clone(), inverse[which].contiguous(), spec).run(check) for part, which in parts]
    )


class _Elimination:
    """Some rows, all of which lose one weight at a time, each its own.

    Applying an elimination to H⁻¹ means reading and writing all of it. So the last ones are kept as vectors u with
    H⁻¹_now = H⁻¹ - Σ u uᵀ: the diagonal is kept up to date, a column is computed when it is needed, and a block of
    vectors is applied by one batched matrix product.

    Attributes:
        left: weights in units of the step size (n, k); those that are done have no meaning.
        inverse: H⁻¹ at the last application, (n, k, k), at the beginning of `memory`.
        diagonal: of H⁻¹ now, (n, k).
        column: which column of the layer each weight is, (n, k).
        done: which weights are rounded, (n, k).
        codes: int8 (n, K).
    """

    def __init__(self, left: Tensor, inverse: Tensor, spec: QuantSpec) -> None:
        n_rows, n_columns = left.shape
        self.spec = spec
        self.left, self.inverse, self.memory = left, inverse, inverse.view(-1)
        self.diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
        self.column = torch.arange(n_columns, device=left.device).repeat(n_rows, 1)
        self.done = torch.zeros_like(left, dtype=torch.bool)
        self.codes = torch.empty_like(left, dtype=torch.int8)

    def run(self, check: Callable[[], None]) -> Tensor:
        """Round every weight and return the codes."""
        n_left = self.left.shape[1]
        while n_left > 0:
            check()
            vectors = self._eliminate(min(BLOCK, n_left))
            n_left -= vectors.shape[1]
            if n_left <= SHRINK * self.left.shape[1]:
                vectors = self._shrink(vectors, n_left)
            self.inverse.baddbmm_(vectors.mT, vectors, alpha=-1)
        return self.codes

    def _eliminate(self, n: int) -> Tensor:
        """Round n weights of each row; return the vectors u (rows, n, k) of their eliminations."""
        n_rows, n_columns = self.left.shape
        vectors = self.left.new_empty(n_rows, n, n_columns)
        row = torch.arange(n_rows, device=self.left.device)
        for i in range(n):
            code = self.left.round().clamp_(self.spec.qmin, self.spec.qmax)
            error = self.left - code
            chosen = self._cheapest(error)
            self.codes[row, self.column[row, chosen]] = code[row, chosen].to(torch.int8)
            self.done[row, chosen] = True
            column = self.inverse[row, chosen]
            if i > 0:
                factors = vectors[row, :i, chosen][:, None]
                column = torch.baddbmm(column[:, None], factors, vectors[:, :i], alpha=-1)[:, 0]
            root = column[row, chosen].sqrt()[:, None]
            vector = torch.div(column, root, out=vectors[:, i])
            self.left.addcmul_(vector, error[row, chosen][:, None] / root, value=-1)
            self.diagonal.addcmul_(vector, vector, value=-1)
        return vectors

    def _cheapest(self, error: Tensor) -> Tensor:
        """Return which weight of each row goes next, (n,)."""
        size = error.abs()
        cost = torch.where(size > 0.5, -size, error.square().div_(self.diagonal))
        return cost.masked_fill_(self.done, torch.inf).argmin(dim=1)

    def _shrink(self, vectors: Tensor, n_left: int) -> Tensor:
        """Forget the weights that are done, in place; return the vectors without them."""
        n_rows = len(self.left)
        keep = (~self.done).nonzero()[:, 1].view(n_rows, n_left)
        smaller = self.memory[: n_rows * n_left**2].view(n_rows, n_left, n_left)
        for row, own in enumerate(keep):  # ascending: what is written over was read before
            smaller[row] = self.inverse[row].index_select(0, own).index_select(1, own)
        self.inverse = smaller
        self.left, self.diagonal, self.column = (t.gather(1, keep) for t in (self.left, self.diagonal, self.column))
        self.done = torch.zeros_like(self.left, dtype=torch.bool)
        return vectors.gather(2, keep[:, None].expand(-1, vectors.shape[1], -1))
