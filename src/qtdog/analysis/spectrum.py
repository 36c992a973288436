"""Eigenvalues of the loss's Hessian: the largest ones, and the density of all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from qtdog.core.errors import extra
from qtdog.core.random import derive, numpy_stream


@dataclass(frozen=True)
class Eigenvalue:
    """One eigenvalue λ of the Hessian.

    Attributes:
        value: the estimate.
        residual: ‖H v - λ v‖ for its unit vector: some eigenvalue lies within this distance of `value`.
        vector: v, of unit length, over all parameters joined.
    """

    value: float
    residual: float
    vector: npt.NDArray[np.float64] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Ritz:
    """What one random vector says of the spectrum: point masses that have the first moments of its own share.

    Attributes:
        values: places of the masses, ascending.
        weights: the masses; they add up to 1.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]


class HessianProduct:
    """H v of the mean loss of a network over batches, in evaluation mode and float32, by a double backward pass.

    It is the product that the trace is made of, so that trace, eigenvalues and density are of one matrix, and it fits
    what curvlinops takes as a linear operator; curvlinops' own operator is its reference in the tests.

    Attributes:
        shape, device, dtype: as a linear operator has them.

    Args:
        parameters: that H is about; leaves that the losses depend on.
        losses: gives pairs of a scalar loss with its graph and its weight, as `hessian_trace.mean_losses` does, anew at
            each call.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian = HessianProduct([w], lambda: [((w**2 * torch.tensor([3.0, 0.5])).sum(), 1.0)])
        >>> (hessian @ torch.tensor([1.0, 1.0])).tolist()
        [6.0, 1.0]
    """

    def __init__(self, parameters: Sequence[Tensor], losses: Callable[[], Iterable[tuple[Tensor, float]]]) -> None:
        self._parameters, self._losses = list(parameters), losses
        n = sum(parameter.numel() for parameter in self._parameters)
        self.shape = (n, n)
        self.device, self.dtype = self._parameters[0].device, self._parameters[0].dtype

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Return H v, shape (n,)."""
        parts = vector.split([parameter.numel() for parameter in self._parameters])
        shaped = [part.reshape(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]
        total = torch.zeros_like(vector)
        for loss, weight in self._losses():
            gradients = torch.autograd.grad(loss, self._parameters, create_graph=True, materialize_grads=True)
            slope = sum((g * v).sum() for g, v in zip(gradients, shaped, strict=True) if g.requires_grad)
            if isinstance(slope, Tensor):  # else a loss without curvature
                images = torch.autograd.grad(slope, self._parameters, materialize_grads=True)
                total += weight * torch.cat([image.flatten() for image in images])
        return total


def lanczos(product: HessianProduct, n_steps: int, seed: int, n: int) -> Ritz:
    """Return what random vector number `n` says of the spectrum, after some Lanczos steps.

    Source: Papyan, JMLR 2020, algorithm 2, as curvlinops has it; Ghorbani et al., ICML 2019.

    Raises:
        ModelError: curvlinops is not installed.
    """
    run = _curvlinops_lanczos()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "lanczos", n))  # curvlinops draws from the global state
        values, vectors = run(product, n_steps)
    return Ritz(tuple(values.double().tolist()), tuple(vectors[0].double().square().tolist()))


def _curvlinops_lanczos() -> Callable[..., tuple[Tensor, Tensor]]:
    with extra("curvature", "the spectral density needs curvlinops"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that it imports
        from curvlinops.papyan2020traces.spectrum import fast_lanczos
    return fast_lanczos


def top_eigenvalues(product: HessianProduct, k: int, *, seed: int = 0, tolerance: float = 1e-2) -> list[Eigenvalue]:
    """Return the k largest eigenvalues, largest first, each with its residual.

    By the implicitly restarted Lanczos method (ARPACK through SciPy) on Hessian-vector products.

    Args:
        product: the Hessian.
        k: how many, below n.
        seed: of the start vector.
        tolerance: relative accuracy that ARPACK is asked for.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence: the eigenvalues are not found in ARPACK's limit of steps.
    """

    def multiply(vector: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        given = torch.from_numpy(np.asarray(vector, dtype=np.float32).reshape(-1)).to(product.device, product.dtype)
        return (product @ given).cpu().double().numpy()

    make, solve = cast(Any, LinearOperator), cast(Any, eigsh)  # scipy's types do not know these arguments
    operator = make(product.shape, matvec=multiply, dtype=np.float64)
    start = numpy_stream(seed, "eigenvalues").standard_normal(product.shape[0])
    values, vectors = solve(operator, k=k, which="LA", tol=tolerance, v0=start)
    found = [
        Eigenvalue(float(value), float(np.linalg.norm(multiply(vector) - value * vector)), vector)
        for value, vector in zip(values, vectors.T, strict=True)
    ]
    return sorted(found, key=lambda eigenvalue: -eigenvalue.value)


def density(
    parts: Sequence[Ritz], grid: npt.NDArray[np.floating], width: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the spectral density on a grid and its standard error over the random vectors.

    φ(t) = mean over the vectors of Σ_i weight_i · N(t; value_i, width²): stochastic Lanczos quadrature.

    Source: Ghorbani et al., ICML 2019, Eq. 5 to 7.

    Args:
        parts: of two random vectors or more.
        grid: places t.
        width: of the Gaussian that smooths.

    Example:
        >>> mean, error = density([Ritz((0.0,), (1.0,))] * 2, np.array([0.0]), 1.0)
        >>> round(mean.item(), 4), error.item()
        (0.3989, 0.0)
    """
    curves = np.array([_smoothed(part, grid, width) for part in parts])
    return curves.mean(0), curves.std(0, ddof=1) / math.sqrt(len(curves))


def _smoothed(part: Ritz, grid: npt.NDArray[np.floating], width: float) -> npt.NDArray[np.float64]:
    distances = (grid[:, None] - np.array(part.values)[None]) / width
    return np.exp(-(distances**2) / 2) @ np.array(part.weights) / (width * math.sqrt(2 * math.pi))
