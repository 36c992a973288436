"""Which layers of a model are quantized: by structure, and by glob patterns on their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from qtdog.core.errors import ConfigError, unknown

WEIGHT_NAMES = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Layer(NamedTuple):
    """A weight that can be quantized, and where it lives.

    Attributes:
        name: the state-dict name without a trailing ".weight": "featurizer.conv1", "blocks.0.attn.in_proj_weight".
        module: the module that owns it.
        tensor_name: its name there, "weight" or an attention in-projection.
    """

    name: str
    module: nn.Module
    tensor_name: str

    @property
    def axis(self) -> int:
        """The dimension of the output channels: 0, but 1 in transposed convolutions."""
        return 1 if getattr(self.module, "transposed", False) else 0

    @property
    def weight(self) -> nn.Parameter:
        """The Parameter that is quantized."""
        return self.module.get_parameter(self.tensor_name)


def layer_name(module_name: str, tensor_name: str) -> str:
    """Return the name of a layer in patterns and reports.

    Example:
        >>> layer_name("head", "weight"), layer_name("attn", "in_proj_weight"), layer_name("", "weight")
        ('head', 'attn.in_proj_weight', 'weight')
    """
    full = f"{module_name}.{tensor_name}" if module_name else tensor_name
    return full.removesuffix(".weight")


def find_layers(model: nn.Module) -> list[Layer]:
    """Return every weight that can be quantized, in the order of the model; a shared module appears once.

    That is every Parameter called `weight` (or an attention in-projection) with two or more dimensions, whatever class
    owns it: Conv1d-3d, transposed, padded and standardized convolutions, Linear, Bilinear, Embedding, attention.

    Raises:
        ConfigError: a lazy layer that has no shape yet.
    """
    return [layer for name, module in model.named_modules() for layer in _weights_of(name, module)]


def _weights_of(name: str, module: nn.Module) -> Iterator[Layer]:
    for tensor_name in WEIGHT_NAMES:
        weight = module._parameters.get(tensor_name)
        if weight is None:
            continue
        if is_lazy(weight):
            raise ConfigError(f"layer '{name}' has no shape yet: run the model once before attaching a quantizer")
        if weight.ndim >= 2 and weight.is_floating_point() and weight.numel():
            yield Layer(layer_name(name, tensor_name), module, tensor_name)


def matches(name: str, pattern: str) -> bool:
    """Return whether a glob pattern means the layer `name`, or a module above it.

    Example:
        >>> matches("blocks.0.mlp.fc1", "blocks.*.mlp"), matches("classifier2", "classifier")
        (True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def check_pattern(pattern: str, layers: Sequence[Layer]) -> None:
    """Refuse a pattern that means no layer.

    Raises:
        ConfigError: naming the nearest layer or module.
    """
    if not any(matches(layer.name, pattern) for layer in layers):
        raise ConfigError(unknown("layer pattern", pattern, _names(layers)))


def select(layers: Sequence[Layer], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Layer]:
    """Return the layers that some `include` pattern means (all if there is none) and no `exclude` pattern means.

    Raises:
        ConfigError: a pattern that means no layer (with the nearest name), or no layer is left.
    """
    for pattern in (*include, *exclude):
        check_pattern(pattern, layers)
    chosen = [
        layer
        for layer in layers
        if (not include or any(matches(layer.name, pattern) for pattern in include))
        and not any(matches(layer.name, pattern) for pattern in exclude)
    ]
    if not chosen:
        raise ConfigError(
            f"no layer is left to quantize: {len(layers)} found, include {list(include)}, exclude {list(exclude)}"
        )
    return chosen


def _names(layers: Sequence[Layer]) -> list[str]:
    """Return the names of the layers and of every module above one: what a pattern can mean."""
    parts = [layer.name.split(".") for layer in layers]
    return sorted({".".join(name[: depth + 1]) for name in parts for depth in range(len(name))})
