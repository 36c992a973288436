"""Post-training quantization (PTQ): round to nearest, GPTQ, and the quadratic problem behind GPTQ and OBC."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.quantizers.base import Quantizer, QuantizerOptions, encode, ranged
from qtdog.quantizers.step_size_init import DEAD_LAYER_SCALE, initial_scale


class Fixed(Quantizer):
    """A weight that trains in float until somebody gives it codes; from then on it is those codes times their steps.

    Buffers: `codes` int8 in the shape and memory format of the weight, `scale` float32 (n,); without a meaning before
    `set_`. Whoever has the codes does not look at the weight any more, and no gradient reaches it.

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
