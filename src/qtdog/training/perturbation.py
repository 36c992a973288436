"""A step rule's look at the loss beside the present weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qtdog.conversion.attach import sites
from qtdog.core.registry import HyperParameter

SPACE = HyperParameter(
    "dequantized",
    "where a quantized weight is moved: at the quantizer's output, or before it ('latent')",
    choices=("dequantized", "latent"),
)


def moving_weights(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `network` that a perturbation moves: those with a gradient, but no quantizer's own.

    A step size is about 2e-3: a move that is small for a weight would break the grid that all its weights live on.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.bias.grad = None
        >>> [tuple(weight.shape) for weight in moving_weights(layer)]
        [(1, 2)]
    """
    own = {id(parameter) for site in sites(network) for parameter in site.quantizer.parameters()}
    return [value for value in network.parameters() if value.grad is not None and id(value) not in own]


def gradient_norm(weights: Sequence[nn.Parameter]) -> Tensor:
    """Return the length of the joint gradient of `weights`, a scalar; 0 for none; the same in whatever order they come.

    Example:
        >>> weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
        >>> (3 * weights[0] + 4 * weights[1]).backward()
        >>> gradient_norm(weights).item()
        5.0
    """
    norms = [torch.linalg.vector_norm(weight.grad) for weight in weights if weight.grad is not None]
    if not norms:
        return torch.zeros(())
    # Sorted, because a network with quantizers attached has its parameters in another order than a plain one, and a run
    # that begins from a float run must go on to the last bit as if it had trained alone.
    return torch.linalg.vector_norm(torch.stack(norms).sort().values)


@contextlib.contextmanager
def perturbed(network: nn.Module, weights: Sequence[nn.Parameter], factor: Tensor, space: str) -> Iterator[None]:
    """Let `network` have w + factor · gradient in place of each w inside the block.

    After it the parameters are what they were, bit for bit (from copies: subtracting would round), and so are the
    buffers: a pass inside the block leaves no trace in the running statistics of batch norm. Gradients may be changed
    inside the block; those at its beginning count.

    In the `latent` space everything is added to the parameters. A quantizer hides a move that stays within a bin, and
    makes a whole step of one that does not. In the `dequantized` space the move of a quantized weight is added to what
    its quantizer returns, so that the network has exactly the perturbed weights; the gradient still reaches the latent
    weight straight through.

    Args:
        network: with or without quantizers.
        weights: parameters of it that have gradients.
        factor: scalar.
        space: "latent" or "dequantized".

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> before = layer.weight.item()
        >>> layer(torch.ones(1, 1)).sum().backward()
        >>> with perturbed(layer, [layer.weight], torch.tensor(0.5), "latent"):
        ...     round(layer.weight.item() - before, 4)
        0.5
        >>> layer.weight.item() == before
        True
    """
    quantizers = {id(site.weight): site.quantizer for site in sites(network)} if space == "dequantized" else {}
    saved = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with contextlib.ExitStack() as undo:
        undo.callback(_put_back, saved)
        for weight in weights:
            assert weight.grad is not None
            move = weight.grad * factor
            if id(weight) in quantizers:
                undo.callback(quantizers[id(weight)].register_forward_hook(_adding(move)).remove)
            else:
                saved.append((weight.data, weight.detach().clone()))
                weight.data.add_(move)
        yield


def _put_back(saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    for value, copy in saved:
        value.copy_(copy)


def _adding(move: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda module, inputs, output: output + move.to(output.dtype)
