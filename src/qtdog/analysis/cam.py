"""Class-activation maps: where in an image a network finds its evidence for a class, through grad-cam."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qtdog.core.errors import ConfigError, ModelError, extra
from qtdog.core.feature_maps import Stage
from qtdog.models.network import Network
from qtdog.models.stages import find_stages

Maps = npt.NDArray[np.float32]


def heatmaps(network: Network, images: Tensor, classes: Sequence[int], *, stage: int = -1) -> Maps:
    """Return Grad-CAM heat maps (n, H, W) in [0, 1], each scaled to its own range.

    A map is ReLU(Σ_k w_k A_k), w_k the mean gradient of the class's logit with respect to channel k of a feature map,
    enlarged to the size of the image. Tokens of a transformer are put back in their places first, and those that belong
    to no place (class token, registers) left out.

    Source: Selvaraju et al., ICCV 2017, Eq. 1 and 2.

    Args:
        network: plain, in evaluation mode; its gradients are left as they are.
        images: prepared, (n, C, H, W), on the network's device.
        classes: of which class each map is (n,).
        stage: which feature map, as `models.stages.find_stages` counts them; -1 for the last.

    Raises:
        ModelError: grad-cam is not installed, or the backbone has no feature maps.
        ConfigError: no such stage.
    """
    found = find_stages(network, (images.shape[1], images.shape[2], images.shape[3]))
    if not -len(found) <= stage < len(found):
        raise ConfigError(f"--stage {stage}: this backbone has {len(found)}, 0 to {len(found) - 1}, or -1 for the last")
    place = found[stage]
    cam_class, target_class = _grad_cam()
    layers = [_layer(network, place)]
    with _gradients_kept(network), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that it uses
        with cam_class(
            model=network, target_layers=layers, reshape_transform=lambda maps: as_images(maps, place)
        ) as cam:
            drawn = cam(input_tensor=images, targets=[target_class(int(label)) for label in classes])
    return np.asarray(drawn, dtype=np.float32)


def as_images(maps: Tensor, stage: Stage) -> Tensor:
    """Return a feature map as (n, C, H, W), whatever its layout.

    Raises:
        ModelError: tokens that make no square.

    Example:
        >>> as_images(torch.zeros(2, 5, 8), Stage("blocks.3", 8, axis=2, ndim=3)).shape  # a class token, then 2 × 2
        torch.Size([2, 8, 2, 2])
    """
    if stage.ndim == 4:
        return maps.movedim(stage.axis, 1)
    tokens = maps.movedim(stage.axis, 1)
    side = int(tokens.shape[2] ** 0.5)
    if side == 0:
        raise ModelError(f"the {tokens.shape[2]} tokens of '{stage.name}' belong to no places in the image")
    return tokens[:, :, -side * side :].unflatten(2, (side, side))


def _layer(network: Network, stage: Stage) -> nn.Module:
    """Return the module whose output is mapped; of a transformer's block what goes into its attention.

    Behind its last block only the class token is read, so that the other tokens have no gradient there.
    """
    module = network.get_submodule(stage.name)
    inner = getattr(module, "norm1", None)
    return inner if stage.ndim == 3 and isinstance(inner, nn.Module) else module


def _grad_cam() -> tuple[Any, Any]:
    with extra("cam", "class-activation maps need grad-cam"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that it imports
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    return GradCAM, ClassifierOutputTarget


@contextlib.contextmanager
def _gradients_kept(network: nn.Module) -> Iterator[None]:
    """Put the parameters' gradients back, which grad-cam clears and fills."""
    before = [parameter.grad for parameter in network.parameters()]
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, grad in zip(network.parameters(), before, strict=True):
            parameter.grad = grad
