"""Feature layers: what a method puts into the network (MixStyle, ARM's context), and the stages where it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Beta

from qtdog.core.errors import ModelError
from qtdog.core.feature_maps import Stage, Style, restyle, style
from qtdog.core.registry import HyperParameter, HyperParameters, Registry, Value, fill
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


ImageShape = tuple[int, int, int]
"""Channels, height and width."""


class FeatureLayer(ABC):
    """A change of the network that works with any objective, quantizer and averager; abstract.

    Raises:
        ConfigError: an unknown hyper-parameter, or a value out of range.

    Attributes:
        HYPERPARAMETERS: name → default, search range, meaning.
        SAVED: whether it is part of the saved network, so that a file is loaded with it.
        LEARNS_STATISTICS: whether it brings batch norm of its own, whose statistics are never frozen.
        COMPILES: whether a pass with it can be one graph of torch.compile: it draws no numbers.
        OBJECTIVES: the only objectives that it makes sense with; empty for any.
        extra_channels: how many channels the featurizer takes besides those of the images.
        params: the values of the hyper-parameters.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {}
    SAVED: ClassVar[bool] = False
    LEARNS_STATISTICS: ClassVar[bool] = False
    COMPILES: ClassVar[bool] = True
    OBJECTIVES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, name: str, params: Mapping[str, Value]) -> None:
        self.params = fill(f"feature layer '{name}'", self.HYPERPARAMETERS, params)

    @property
    def extra_channels(self) -> int:
        """Channels that the featurizer takes besides those of the images."""
        return 0

    @abstractmethod
    def install_(self, network: Network, image_shape: ImageShape) -> None:
        """Put the layer into a network that takes images of `image_shape`, in place.

        Random starts come from torch's global state, which the caller seeds.

        Raises:
            ModelError: the network has no place for it.
        """


FEATURE_LAYERS: Registry[type[FeatureLayer]] = Registry("feature layer")


@FEATURE_LAYERS.register("none")
class NoFeatureLayer(FeatureLayer):
    """The backbone as it is."""

    def install_(self, network: Network, image_shape: ImageShape) -> None:
        """Leave the network as it is."""


def mix_styles(features: Tensor, stage: Stage, weight: Tensor, partner: Tensor) -> Tensor:
    """Return the features with their style mixed with that of a partner.

    Formula, with μ and σ over the positions of an image, per channel:

        σ' = λ σ(x) + (1 - λ) σ(x̃),   μ' = λ μ(x) + (1 - λ) μ(x̃),   x' = σ' (x - μ(x)) / σ(x) + μ'

    The gradient does not pass through μ and σ. Source: Zhou et al., *Domain Generalization with MixStyle* (ICLR 2021).

    Args:
        features: a feature map of n images, laid out as `stage` says.
        stage: layout of the map.
        weight: λ of each image, shape (n,).
        partner: which image x̃ is, int64, shape (n,).

    Example:
        >>> tokens = Stage("blocks.0", n_channels=1, axis=2, ndim=3)
        >>> features = torch.tensor([[[0.0], [2.0]], [[10.0], [14.0]]])
        >>> mixed = mix_styles(features, tokens, weight=torch.tensor([0.5, 1.0]), partner=torch.tensor([1, 0]))
        >>> mixed.flatten(1)
        tensor([[ 5.0000,  8.0000],
                [10.0000, 14.0000]])
    """
    own = style(features.detach(), stage.positions)
    share = weight.to(own.mean.dtype).reshape(-1, *[1] * (features.ndim - 1))
    mixed = (share * value + (1 - share) * value[partner] for value in own)
    return restyle(features, own, Style(*mixed))


@dataclass(frozen=True)
class _Mixing:
    """The forward hook of one stage: stateless, so that it survives a copy and is no part of the state dict."""

    stage: Stage
    p: float
    alpha: float

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        # Few numbers, drawn on the CPU: reading one that lies elsewhere would wait for the device.
        if not module.training or torch.rand(()).item() >= self.p:
            return None
        n = len(output)
        concentration = torch.full((n,), self.alpha)
        weight, partner = Beta(concentration, concentration).sample(), torch.randperm(n)
        drawn = [value.to(output.device, non_blocking=True) for value in (weight, partner)]
        return mix_styles(output, self.stage, *drawn)


@FEATURE_LAYERS.register("mixstyle")
class MixStyle(FeatureLayer):
    """Mix the styles of random pairs of images, in training only (Zhou et al., ICLR 2021); never saved.

    After each of the first stages, with probability p per batch, every image gets the style that `mix_styles` mixes
    with weight λ ~ Beta(α, α) from its own and that of a random image of the batch (the paper's variant without domain
    labels). Never after the last stage: there the style says what the image shows.
    """

    COMPILES: ClassVar[bool] = False

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "p": HyperParameter(0.5, "probability that a stage mixes, drawn for each batch", low=0, high=1),
        "alpha": HyperParameter(0.1, "of Beta(alpha, alpha), from which the weight of each image is drawn", 1e-3, 100),
        "n_stages": HyperParameter(3, "after how many stages, from the first on", low=1, high=16),
    }

    def install_(self, network: Network, image_shape: ImageShape) -> None:
        """Hook the stages of a network.

        Raises:
            ModelError: the backbone has no stages, or but one.
        """
        stages = find_stages(network, image_shape)
        if len(stages) < 2:
            text = "this backbone has one stage only, and MixStyle goes between stages"
            raise ModelError(f"{text}: take another backbone, or --set model.feature_layer=none.")
        for stage in stages[:-1][: int(self.params["n_stages"])]:
            mixing = _Mixing(stage, float(self.params["p"]), float(self.params["alpha"]))
            network.get_submodule(stage.name).register_forward_hook(mixing)


KERNEL = 5


class Context(nn.Module):
    """Images to the input of the backbone: the images, and beside them the context of their domain.

    The context c = 1/n Σ_i φ(x_i) is the mean, over the images of a domain, of what a small network φ (three 5 × 5
    convolutions with batch norm and ReLU between them) says of each image at each position. Source: Zhang et al.,
    *Adaptive Risk Minimization* (NeurIPS 2021), contextual meta-learning; φ as in DomainBed's `ContextNet`.

    Its batch norm always learns its statistics: there are no pretrained ones to keep.

    Args:
        channels: of the images.
        n_context: channels of the context.
        width: channels inside.
        group: images that share a context where no domains are given, in their order (DomainBed evaluates in groups of
            its training batch, 8); the last group may be smaller. 0: all that are given together.

    Shapes:
        (n, channels, H, W) → (n, channels + n_context, H, W)

    Example:
        >>> context = Context(channels=3, n_context=1, width=4)
        >>> context(torch.rand(5, 3, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(self, channels: int, n_context: int, width: int, group: int = 0) -> None:
        super().__init__()
        self.group = group
        widths = [channels, width, width, n_context]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            if index:
                layers += [nn.BatchNorm2d(before), nn.ReLU()]
            layers.append(nn.Conv2d(before, after, KERNEL, padding=KERNEL // 2))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Return the images with their context.

        Args:
            images: shape (n, channels, H, W), domain after domain.
            sizes: images of each domain, adding up to n; default: groups of `group`, or all are of one domain.
        """
        if sizes is None and self.group:
            maps = self.layers(images)
            context = (_shares(maps.shape[0], self.group).to(maps) @ maps.flatten(1)).view_as(maps)
            return torch.cat([images, context.to(images.dtype)], dim=1)
        parts = self.layers(images).split(list(sizes) if sizes else len(images))
        contexts = [part.mean(dim=0, keepdim=True).expand_as(part) for part in parts]
        return torch.cat([images, torch.cat(contexts).to(images.dtype)], dim=1)


def _shares(n: int, group: int) -> Tensor:
    """The share of image j in the mean of the group of image i, (n, n): a matrix, which exports with any n."""
    place = torch.arange(n) // group
    same = (place[:, None] == place[None, :]).to(torch.float32)
    return same / same.sum(1, keepdim=True)


@FEATURE_LAYERS.register("context")
class ContextLayer(FeatureLayer):
    """A context network before the backbone (Zhang et al., NeurIPS 2021); saved, and for the objective arm.

    The network then answers for a batch: its context is the mean over the images that it is given together.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "channels": HyperParameter(1, "channels of the context", low=1, high=16),
        "width": HyperParameter(64, "channels inside the context network", low=1, high=512),
        "group": HyperParameter(0, "images that share a context in evaluation, as given; 0: the batch", 0, 4096),
    }
    SAVED = True
    LEARNS_STATISTICS = True
    OBJECTIVES = ("arm",)

    @property
    def extra_channels(self) -> int:
        """Channels of the context."""
        return int(self.params["channels"])

    def install_(self, network: Network, image_shape: ImageShape) -> None:
        """Put a context network with a random start before the featurizer."""
        sizes = (self.extra_channels, int(self.params["width"]), int(self.params["group"]))
        network.context = Context(image_shape[0], *sizes)


def make_feature_layer(name: str, params: Mapping[str, Value]) -> FeatureLayer:
    """Return the feature layer of that name, not yet in a network.

    Raises:
        ConfigError: an unknown name (with the nearest match), hyper-parameter or value.

    Example:
        >>> make_feature_layer("mixstyle", {"p": 0.3}).params
        {'p': 0.3, 'alpha': 0.1, 'n_stages': 3}
    """
    return FEATURE_LAYERS[name](name, params)
