"""The trace of the loss's Hessian, block by block, without ever forming the Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qtdog.core.random import torch_stream


@dataclass(frozen=True)
class BlockTrace:
    """The trace of one diagonal block of the Hessian.

    Attributes:
        trace: the estimate of Σ_i ∂²L/∂w_i² over the block.
        standard_error: of the estimate, from the spread over the random vectors.
        n_weights: weights in the block.
    """

    trace: float
    standard_error: float
    n_weights: int

    @property
    def mean(self) -> float:
        """The mean curvature of a weight: trace / n_weights."""
        return self.trace / self.n_weights


def block_traces(
    parameters: Mapping[str, Tensor],
    losses: Iterable[tuple[Tensor, float]],
    *,
    n_vectors: int = 50,
    seed: int = 0,
) -> dict[str, BlockTrace]:
    """Return the trace of each parameter's block of the Hessian, by Hutchinson's estimator with Rademacher vectors.

    With v of independent entries ±1 over all parameters joined, E[v_lᵀ (H v)_l] = tr H_ll, because blocks of different
    parameters are independent: one Hessian-vector product (a double backward pass) serves all blocks.

    Source: Hutchinson, 1989; block-wise as in HAWQ-V2 (Dong et al., NeurIPS 2020, section 3.2).

    Args:
        parameters: the blocks, by name; leaves that the losses depend on.
        losses: pairs of a scalar loss with its graph and its weight; L is their weighted sum. Each is used up before
            the next is asked for, so that a generator never holds two graphs.
        n_vectors: random vectors, 2 or more.
        seed: of the vectors.

    Raises:
        ValueError: fewer than two vectors, of which no spread could be known.
        RuntimeError: a layer has no second derivative in torch.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> found = block_traces({"w": w}, [((w**2 * torch.tensor([3.0, 0.5])).sum(), 1.0)], n_vectors=2)
        >>> found["w"].trace, found["w"].standard_error
        (7.0, 0.0)
    """
    if n_vectors < 2:
        raise ValueError(f"n_vectors must be at least 2, not {n_vectors}")
    leaves = list(parameters.values())
    products = vector_products(leaves, losses, range(n_vectors), seed=seed)
    errors = products.std(0) / math.sqrt(n_vectors)
    return {
        name: BlockTrace(trace, error, leaf.numel())
        for (name, leaf), trace, error in zip(
            parameters.items(), products.mean(0).tolist(), errors.tolist(), strict=True
        )
    }


def vector_products(
    leaves: Sequence[Tensor], losses: Iterable[tuple[Tensor, float]], numbers: Sequence[int], *, seed: int = 0
) -> Tensor:
    """Return v_lᵀ (H v)_l of each block l for the random vectors with these numbers, float64 (vectors, blocks).

    Their sum over the blocks is vᵀ H v, of which tr H is the mean.

    Args:
        leaves: the blocks.
        losses: as in `block_traces`.
        numbers: of the vectors: number n is the same whichever others are asked for.
        seed: of the vectors.

    Raises:
        RuntimeError: a layer has no second derivative in torch.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> vector_products([w], [((w**2).sum(), 1.0)], [7]).tolist()
        [[4.0]]
    """
    products = torch.zeros(len(numbers), len(leaves), dtype=torch.float64)
    for loss, weight in losses:
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        for row, n in enumerate(numbers):
            products[row] += weight * _products(gradients, leaves, seed, n)
        del loss, gradients
    return products


def rademacher(leaves: Sequence[Tensor], seed: int, n: int) -> list[Tensor]:
    """Return random vector number `n`: independent signs ±1, in the shapes, types and devices of the leaves.

    Drawn on the CPU, so that every device sees the same.

    Example:
        >>> rademacher([torch.zeros(2, 3)], 0, 0)[0].abs().tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    generator = torch_stream(seed, "rademacher", n)
    drawn = [torch.randint(2, leaf.shape, generator=generator, dtype=torch.int8) * 2 - 1 for leaf in leaves]
    return [part.to(leaf) for part, leaf in zip(drawn, leaves, strict=True)]


def _products(gradients: Sequence[Tensor], leaves: Sequence[Tensor], seed: int, n: int) -> Tensor:
    """Return v_lᵀ (H v)_l for each block l, with vector number n."""
    vectors = rademacher(leaves, seed, n)
    if not any(gradient.requires_grad for gradient in gradients):  # a loss without curvature
        return torch.zeros(len(leaves), dtype=torch.float64)
    curved = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g.requires_grad]
    outputs, weights = zip(*curved, strict=True)
    images = torch.autograd.grad(outputs, leaves, weights, retain_graph=True, materialize_grads=True)
    sums = [(v.double() * image.double()).sum() for v, image in zip(vectors, images, strict=True)]
    return torch.stack(sums).cpu()


def mean_losses(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], n_images: float
) -> Iterator[tuple[Tensor, float]]:
    """Yield the mean cross-entropy of each batch, with its graph and its share of all images, for `block_traces`.

    In evaluation mode and float32; the network's own mode is put back at the end. Attention takes the kernel that has
    a second derivative.

    Args:
        network: images (n, C, H, W) → logits (n, n_classes).
        batches: images and labels (n,), on any device.
        n_images: in all batches together.
    """
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    try:
        for images, labels in batches:
            with sdpa_kernel(SDPBackend.MATH):
                loss = functional.cross_entropy(network(images.to(device)), labels.to(device))
            yield loss, len(labels) / n_images
    finally:
        network.train(was_training)
