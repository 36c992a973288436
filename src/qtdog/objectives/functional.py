"""Terms that several objectives share: losses by domain, pairs of domains, heads, stages, inner gradient steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.functional import cross_entropy

from qtdog.core.feature_maps import Stage
from qtdog.core.random import derive
from qtdog.objectives.base import DomainOutputs, ModelView, gradients


def domain_losses(domains: Sequence[DomainOutputs]) -> Tensor:
    """Return the mean cross-entropy of each domain, shape (n_domains,).

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> domain_losses([DomainOutputs(logits, logits, torch.tensor([0, 3]))] * 2)  # log 4
        tensor([1.3863, 1.3863])
    """
    return torch.stack([functional.cross_entropy(domain.logits, domain.labels) for domain in domains])


T = TypeVar("T")


def mean_over_pairs(distance: Callable[[T, T], Tensor], domains: Sequence[T]) -> Tensor:
    """Return the mean of `distance` over all unordered pairs of two or more domains.

    Example:
        >>> mean_over_pairs(lambda x, y: (x - y).abs(), torch.tensor([0.0, 1.0, 5.0]).unbind())  # of 1, 5 and 4
        tensor(3.3333)
    """
    return torch.stack([distance(one, other) for one, other in combinations(domains, 2)]).mean()


def random_ring(n: int) -> list[tuple[int, int]]:
    """Return n pairs of neighbors on a ring of n domains in random order: each domain is first once, second once.

    Drawn from torch's global state, which the training loop seeds for every step.

    Example:
        >>> pairs = random_ring(4)
        >>> sorted(first for first, _ in pairs) == sorted(second for _, second in pairs) == [0, 1, 2, 3]
        True
    """
    order = torch.randperm(n).tolist()
    return list(zip(order, order[1:] + order[:1], strict=True))


def linear_head(n_features: int, n_classes: int, seed: int, name: str) -> nn.Linear:
    """Return a linear layer; its random start is that of the stream called `name`, global state is left alone.

    Example:
        >>> one, other = (linear_head(4, 2, seed=0, name="style") for _ in range(2))
        >>> torch.equal(one.weight, other.weight)
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "init", name))
        return nn.Linear(n_features, n_classes)


Act = Callable[[Stage, Tensor], Tensor | None]
"""(stage, its feature map) to the map that takes its place, or None to leave it."""


@contextlib.contextmanager
def at_stages(network: nn.Module, stages: Sequence[Stage], act: Act) -> Iterator[None]:
    """Call `act` on the feature map of each stage in every forward pass inside the block.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Identity(), nn.Flatten())
        >>> with at_stages(network, [Stage("0", 1, axis=1, ndim=4)], lambda stage, features: features + 1):
        ...     network(torch.zeros(1, 1, 1, 2))
        tensor([[1., 1.]])
    """

    def hook(stage: Stage) -> Any:
        return lambda module, inputs, output: act(stage, output)

    with contextlib.ExitStack() as stack:
        for stage in stages:
            stack.enter_context(network.get_submodule(stage.name).register_forward_hook(hook(stage)))
        yield


@contextlib.contextmanager
def kept_at_stages(network: nn.Module, stages: Sequence[Stage]) -> Iterator[list[Tensor]]:
    """Yield a list into which a forward pass inside the block puts the feature map of each stage, in order.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Identity(), nn.Flatten())
        >>> with kept_at_stages(network, [Stage("0", 1, axis=1, ndim=4)]) as maps:
        ...     _ = network(torch.zeros(1, 1, 1, 2))
        >>> [tuple(found.shape) for found in maps]
        [(1, 1, 1, 2)]
    """
    maps: list[Tensor] = []
    with at_stages(network, stages, lambda stage, features: maps.append(features)):
        yield maps


Tensors = Mapping[str, Tensor]


def loss_and_gradients(
    view: ModelView, parameters: Tensors, images: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean cross-entropy with other values of the parameters, and its gradient there.

    Args:
        view: the model.
        parameters: name to value, each of which requires a gradient.
        images: shape (n, C, H, W).
        labels: int64, shape (n,).

    Returns:
        The loss, detached, and the gradient of each parameter that it reaches.
    """
    loss = cross_entropy(view.logits_with(parameters, images), labels)
    return loss.detach(), gradients(loss, parameters)


def moved(parameters: Tensors, gradient: Tensors, lr: float) -> dict[str, Tensor]:
    """Return the parameters after one step of gradient descent, as leaves of their own; the given ones stay.

    Example:
        >>> import torch
        >>> moved({"w": torch.tensor(3.0), "unused": torch.tensor(1.0)}, {"w": torch.tensor(6.0)}, 0.5)
        {'w': tensor(0., requires_grad=True), 'unused': tensor(1.)}
    """
    stepped = {name: (parameters[name].detach() - lr * grad).requires_grad_() for name, grad in gradient.items()}
    return {**parameters, **stepped}


def add_(total: dict[str, Tensor], gradient: Tensors, factor: float = 1.0) -> None:
    """Add `factor` times a gradient to `total`, in place.

    Example:
        >>> import torch
        >>> total = {"w": torch.tensor(1.0)}
        >>> add_(total, {"w": torch.tensor(2.0), "v": torch.tensor(1.0)}, 10)
        >>> total
        {'w': tensor(21.), 'v': tensor(10.)}
    """
    for name, grad in gradient.items():
        total[name] = total[name] + factor * grad if name in total else factor * grad


class _Given(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, given: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.given = given
        return value.clone()

    @staticmethod
    @once_differentiable  # its type makes ctx positional-only
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, None, *(grad_outputs[0] * grad for grad in ctx.given)


def with_gradients(value: Tensor, parameters: Tensors, gradient: Tensors) -> Tensor:
    """Return a scalar that is `value`, and whose gradient is the given one; other parameters get none.

    Example:
        >>> import torch
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> loss = with_gradients(torch.tensor(7.0), {"w": w}, {"w": torch.tensor(-1.0)})
        >>> (2 * loss).backward()
        >>> loss.item(), w.grad.item()
        (7.0, -2.0)
    """
    return _Given.apply(value, list(gradient.values()), *(parameters[name] for name in gradient))
