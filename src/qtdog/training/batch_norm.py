"""Statistics of batch norm that fit averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from qtdog.models.network import Network
from qtdog.training.components import Components

N_BATCHES = 50


def fit_batch_norm_(components: Components, n_batches: int = N_BATCHES) -> None:
    """Re-estimate the running statistics for the weights that the network now has, where they are not frozen.

    Statistics gathered while the weights moved do not fit their average (Izmailov et al., UAI 2018, section 3.2). They
    are measured on the first `n_batches` training batches of the sources (`TrainBatches.batch` of steps 0 to 49,
    augmented as in training, the domains apart where the network has a context), so that they depend on the weights
    alone. The processes share the batches and take the mean.
    """
    layers = _learning(components.network)
    if not layers:
        return
    accelerator, network = components.accelerator, components.network
    batches = (components.batches.batch(step) for step in range(n_batches))
    passes = (partial(network.features, batch.images.to(accelerator.device), batch.sizes) for batch in batches)
    _estimate_(network, layers, passes)
    if accelerator.num_processes > 1:
        for buffer in _statistics(layers):
            shared = accelerator.reduce(buffer, reduction="mean")
            assert isinstance(shared, Tensor)
            buffer.copy_(shared)


def take_batch_norm_of_the_first_process_(components: Components) -> None:
    """Give every process the running statistics of the first, which are those that are saved.

    A training step begins with that (`DistributedDataParallel`), but its forward pass then moves each process's own: an
    evaluation right behind it would be of several networks.
    """
    if components.accelerator.num_processes > 1:
        for buffer in _statistics(_learning(components.network)):
            first = broadcast(buffer)
            assert isinstance(first, Tensor)
            buffer.copy_(first)


def estimate_statistics_(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of every batch-norm layer to the mean of what they are on each batch.

    All else is in evaluation mode: the weights are those that are saved, nothing is dropped. The mode is put back.

    Args:
        network: changed in place.
        batches: images (n, C, H, W) on the network's device; of the same n, so that each counts the same.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> estimate_statistics_(layer, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])])
        >>> layer.running_mean.tolist(), layer.running_var.tolist()  # variances 2 and 8
        ([3.5], [5.0])
    """
    _estimate_(network, _layers(network), (partial(network, images) for images in batches))


@torch.no_grad()
def _estimate_(network: nn.Module, layers: Sequence[_BatchNorm], passes: Iterable[Callable[[], object]]) -> None:
    momenta = [layer.momentum for layer in layers]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # PyTorch's name for the mean of all batches
        layer.train()
    try:
        with parametrize.cached():
            for forward in passes:
                forward()
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _layers(network: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


def _statistics(layers: Sequence[_BatchNorm]) -> list[Tensor]:
    return [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None]


def _learning(network: Network) -> list[_BatchNorm]:
    """Return the layers whose statistics training moves: all, or all outside of a featurizer that keeps its own."""
    frozen = set(network.featurizer.modules()) if network.freeze_bn else set()
    return [layer for layer in _layers(network) if layer not in frozen]
