"""Where a backbone has its stages: the places that methods on feature maps look at or change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtdog.core.errors import ModelError
from qtdog.core.feature_maps import Stage
from qtdog.models.network import Network

# A transformer is one long stage: its blocks are taken in as many groups as a residual network has stages.
N_GROUPS = 4
PREFIX = "featurizer."


@dataclass(frozen=True)
class _Place:
    """What timm says of a place: its module, its channels, and how many pixels one of its positions spans."""

    name: str
    n_channels: int
    reduction: int


def find_stages(network: Network, image_shape: tuple[int, int, int]) -> list[Stage]:
    """Return the stages of a network's featurizer, first to last, its stem left out.

    These are the modules that timm's `feature_info` names (layer1 … layer4 of a ResNet, the last block of each
    resolution of an EfficientNet, the stages of ConvNeXt, RegNet or Swin), of a transformer with blocks of one
    resolution the last of each quarter, and of the networks for digits each group norm. The layout of the maps is found
    by sending one image of zeros through.

    Args:
        network: its mode is put back afterwards.
        image_shape: of the images that it takes, (channels, height, width).

    Raises:
        ModelError: the backbone says of no module that a feature map is behind it.

    Example:
        >>> from qtdog.models.backbones import create_network
        >>> network = create_network(
        ...     "resnet18", n_classes=2, channels=3, image_size=32, weights="none", freeze_bn=True, seed=0
        ... )
        >>> [(stage.name, stage.n_channels) for stage in find_stages(network, (3, 32, 32))][:2]
        [('featurizer.layer1', 64), ('featurizer.layer2', 128)]
    """
    places = _in_groups(_without_stem(network.featurizer, _places(network.featurizer)))
    maps = _maps(network, [place.name for place in places], image_shape) if places else {}
    is_nhwc = str(getattr(network.featurizer, "output_fmt", "")) == "NHWC"
    stages = [stage for place in places if (stage := _stage(place, maps.get(place.name), is_nhwc=is_nhwc))]
    if not stages:
        kind = type(network.featurizer).__name__
        raise ModelError(
            f"this backbone ({kind}) has no stages with a feature map behind them, which the chosen method needs. "
            "Take a backbone with stages, like resnet18, tf_efficientnet_lite0, convnext_atto or vit_tiny_patch16_224."
        )
    return stages


def _places(featurizer: nn.Module) -> list[_Place]:
    """Return the modules that exist of those that the backbone names, in order, each once."""
    modules = dict(featurizer.named_modules())
    found = {place.name: place for place in _described(featurizer) if place.name and place.name in modules}
    return list(found.values())


def _described(featurizer: nn.Module) -> Iterator[_Place]:
    info: Any = getattr(featurizer, "feature_info", None)
    if info is not None:
        for entry in getattr(info, "info", info):
            yield _Place(entry["module"], entry["num_chs"], entry["reduction"])
    elif isinstance(featurizer, nn.Sequential):  # the networks for digits
        for index, (name, child) in enumerate(featurizer.named_children()):
            if isinstance(child, nn.GroupNorm):
                yield _Place(name, child.num_channels, index)


def _without_stem(featurizer: nn.Module, places: list[_Place]) -> list[_Place]:
    """Drop the first place if it is the stem: named so, or a single layer before modules of many."""
    if len(places) < 2:
        return places
    first, second = (_n_layers(featurizer.get_submodule(place.name)) for place in places[:2])
    is_stem = "stem" in places[0].name or first < 2 <= second
    return places[1:] if is_stem else places


def _n_layers(module: nn.Module) -> int:
    """Return how many modules inside have parameters of their own."""
    return sum(next(child.parameters(recurse=False), None) is not None for child in module.modules())


def _in_groups(places: list[_Place]) -> list[_Place]:
    """Return the last of each quarter, if there are more than four places and all are of one resolution."""
    if len(places) <= N_GROUPS or len({place.reduction for place in places}) > 1:
        return places
    return [places[-(-group * len(places) // N_GROUPS) - 1] for group in range(1, N_GROUPS + 1)]


@torch.no_grad()
def _maps(network: Network, names: Sequence[str], image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Return what each module gives for one image of zeros, where that is a tensor."""
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                maps[name] = output

        return hook

    like = next(network.parameters())
    handles = [network.featurizer.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    was_training = network.training
    network.eval()
    try:
        network.features(torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype))
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    return maps


def _stage(place: _Place, found: Tensor | None, *, is_nhwc: bool) -> Stage | None:
    """Return the stage at a place; None if what comes out there is no feature map of that many channels."""
    if found is None or found.ndim not in (3, 4):
        return None
    last = found.ndim - 1
    axes = (last, 1) if is_nhwc or found.ndim == 3 else (1, last)
    axis = next((axis for axis in axes if found.shape[axis] == place.n_channels), None)
    return None if axis is None else Stage(PREFIX + place.name, place.n_channels, axis, found.ndim)
