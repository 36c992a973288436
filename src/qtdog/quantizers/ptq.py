"""Post-training quantization (PTQ) of one weight: RTN, GPTQ, OBC, and the member that holds finished codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.quantizers.base import Quantizer, QuantizerOptions, encode, ranged
from qtdog.quantizers.step_size_init import DEAD_LAYER_SCALE, initial_scale


class Fixed(Quantizer):
    """A weight that trains in float until `set_` gives it codes; from then on it is those codes times their steps.

    Buffers: `codes` int8 in the shape and memory format of the weight, `scale` float32 (n,); without a meaning before
    `set_`. With codes the weight is not read any more, and no gradient reaches it.

    Args:
        weight: the weight to quantize; only its shape, memory format and device count.
        spec: bits and axis.
        options: how the step sizes are found, and the range of the codes.
        needs_images: whether the method that finds the codes learns from images, so that `enable_` cannot.

    Example:
        >>> weight = torch.tensor([[0.9, -2.0]])
        >>> fixed = Fixed(weight, QuantSpec(2))
        >>> fixed(weight) is weight, fixed.packs
        (True, False)
        >>> fixed.set_(QuantizedTensor(torch.tensor([[1, -2]], dtype=torch.int8), torch.tensor([0.5]), QuantSpec(2)))
        >>> fixed(weight).tolist()
        [[0.5, -1.0]]
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        spec: QuantSpec,
        options: QuantizerOptions | None = None,
        *,
        needs_images: bool = False,
    ) -> None:
        options = options or QuantizerOptions()
        super().__init__(ranged(spec, options.range))
        self.init = options.init
        self.needs_images = needs_images
        start = torch.full((spec.n_scales(weight.shape),), DEAD_LAYER_SCALE, dtype=torch.float32, device=weight.device)
        self.register_buffer("codes", torch.zeros_like(weight, dtype=torch.int8, requires_grad=False))
        self.register_buffer("scale", start)

    @torch.no_grad()
    def rounded(self, weight: Tensor) -> QuantizedTensor:
        """Return `weight` rounded to nearest, with the step sizes of the start that the options name."""
        return encode(weight, initial_scale(weight, self.spec, self.init), self.spec)

    @torch.no_grad()
    def set_(self, value: QuantizedTensor) -> None:
        """Be `value` from now on.

        Raises:
            ValueError: its shapes or its grid are not those of this quantizer.
        """
        given = (value.codes.shape, value.scale.shape, value.spec)
        own = (self.codes.shape, self.scale.shape, self.spec)
        if given != own:
            raise ValueError(f"codes, step sizes and grid are {given}, expected {own}")
        self.codes.copy_(value.codes)
        self.scale.copy_(value.scale)
        self.enabled = True

    def enable_(self, weight: Tensor) -> None:
        """Round to nearest, which is all that can be done without images.

        Raises:
            ConfigError: the method learns from images.
        """
        if self.needs_images:
            raise ConfigError(
                "this quantizer finds its codes from images, after training: call "
                "qtdog.conversion.calibrate.calibrate_(model, method, batches) instead of enable()"
            )
        self.set_(self.rounded(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight itself, or, once there are codes, what they stand for in the weight's type."""
        return self.quantized(weight).dequantize().to(weight.dtype) if self.enabled else weight

    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes that were set, whatever the weight.

        Raises:
            RuntimeError: there are none yet.
        """
        return QuantizedTensor(self.codes, self.step_sizes(), self.spec) if self.enabled else super().quantized(weight)

    def step_sizes(self) -> Tensor:
        """Return the step sizes, float32, shape (n,)."""
        return self.set_only(self.scale, DEAD_LAYER_SCALE)

    @property
    def holds_codes(self) -> bool:
        """Whether the codes have been set."""
        return self.enabled

    def resume_(self, value: QuantizedTensor) -> None:
        """Take codes and step sizes of `value`."""
        self.check_grid(value, self.scale.numel())
        self.set_(value)

    def _looks_enabled(self) -> bool:
        return bool((self.scale != DEAD_LAYER_SCALE).any())


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
        check: is called between blocks; may raise to break off.

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


MEMORY_BYTES = 2**29  # for the inverse Hessians of the rows that are worked on together
N_PENDING = 64  # eliminations that are kept as factors before they are applied to the inverse Hessians
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
        check: is called between blocks; may raise to break off.

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
            vectors = self._eliminate(min(N_PENDING, n_left))
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
