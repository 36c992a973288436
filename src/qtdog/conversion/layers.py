"""Which weights of a model can be quantized, which a pattern means, and what is left in float."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from qtdog.core.errors import ConfigError, unknown
from qtdog.core.quantized import QuantSpec

WEIGHT_NAMES = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
RECURRENT_WEIGHT = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")
NORM_CLASS = re.compile(r"Norm(\d?d)?$")
NORM_CLASSES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# Parameters that are no layer's weight (position embeddings, say) are worth a warning beyond this share of the model.
MAX_OTHER_FRAC = 0.05
MAGNITUDES = ("original0", "weight_g")  # the one of weight_norm's two parts that is no matrix


class Layer(NamedTuple):
    """A weight that can be quantized, and where it lives.

    Attributes:
        name: the state-dict name without a trailing ".weight": "featurizer.conv1", "blocks.0.attn.in_proj_weight".
        module: the module that owns it.
        tensor_name: its name there, "weight", an attention in-projection, or "weight_hh_l0" of a recurrent layer.
    """

    name: str
    module: nn.Module
    tensor_name: str

    @property
    def plain_name(self) -> str:
        """The weight's name in the state dict."""
        return f"{self.name}.weight" if self.tensor_name == "weight" and self.name != "weight" else self.name

    @property
    def axis(self) -> int:
        """The dimension of the output channels: 0, but 1 in transposed convolutions and in (in, out) linear layers."""
        if getattr(self.module, "transposed", False):
            per_group = self.weight.shape[1]
            return 0 if per_group == 1 and self._groups == self.weight.shape[0] else 1
        return 1 if type(self.module).__name__ == "Conv1D" and hasattr(self.module, "nf") else 0

    def spec(self, bits: int, granularity: str) -> QuantSpec:
        """Return the grid with one step size per output "channel", or per "layer"."""
        if granularity == "layer":
            return QuantSpec(bits, None)
        grouped = bool(getattr(self.module, "transposed", False)) and self.axis == 1
        return QuantSpec(bits, self.axis, groups=self._groups if grouped else 1)

    @property
    def _groups(self) -> int:
        return int(getattr(self.module, "groups", 1))

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


def is_weight_name(name: str) -> bool:
    """Return whether a Parameter of this name is a layer's weight.

    Example:
        >>> is_weight_name("weight"), is_weight_name("weight_hh_l0_reverse"), is_weight_name("weight_g")
        (True, True, False)
    """
    return name in WEIGHT_NAMES or RECURRENT_WEIGHT.fullmatch(name) is not None


def find_layers(model: nn.Module) -> list[Layer]:
    """Return every weight that can be quantized, in the order of the model; a shared module appears once.

    That is every Parameter called `weight` (or an attention in-projection, or a weight of a recurrent layer) with two
    or more dimensions, whatever class owns it: Conv1d-3d, transposed, padded and standardized convolutions, Linear,
    Bilinear, Embedding, attention, LSTM, GRU. Norm layers and scripted modules have none.

    Raises:
        ConfigError: a lazy layer that has no shape yet.
    """
    return [layer for name, module in model.named_modules() for layer in _weights_of(name, module)]


def _weights_of(name: str, module: nn.Module) -> Iterator[Layer]:
    if isinstance(module, torch.jit.ScriptModule) or is_norm(module):
        return
    recurrent = [other for other in module._parameters if RECURRENT_WEIGHT.fullmatch(other)]
    for tensor_name in (*WEIGHT_NAMES, *recurrent):
        weight = module._parameters.get(tensor_name)
        if weight is None:
            continue
        if is_lazy(weight):
            raise ConfigError(f"layer '{name}' has no shape yet: run the model once before attaching a quantizer")
        if weight.ndim >= 2 and weight.is_floating_point() and weight.numel():
            yield Layer(layer_name(name, tensor_name), module, tensor_name)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalizes: its weight may have many dimensions, but multiplies value by value.

    Example:
        >>> is_norm(nn.LayerNorm([3, 4, 4])), is_norm(nn.Linear(3, 4))
        (True, False)
    """
    return isinstance(module, NORM_CLASSES) or NORM_CLASS.search(type(module).__name__) is not None


class FloatWeight(NamedTuple):
    """A Parameter of two or more dimensions that no quantizer covers.

    Attributes:
        name: of its layer, as in patterns.
        n_weights: how many numbers it has.
        reason: why: "not selected" (a layer that `include` and `exclude` leave out), "scripted", "parametrized by …",
            "pruned", "weight_norm", or "no layer's weight".
    """

    name: str
    n_weights: int
    reason: str


NOT_SELECTED = "not selected"
OTHER = "no layer's weight"


@dataclass(frozen=True)
class Coverage:
    """How much of a model is quantized.

    Attributes:
        n_parameters: of the model, those of the quantizers left out.
        n_quantized: that quantizers cover.
        left: the weights of two or more dimensions that stay in float, in the order of the model.
    """

    n_parameters: int
    n_quantized: int
    left: tuple[FloatWeight, ...]

    @property
    def quantized_frac(self) -> float:
        """Share of the parameters that quantizers cover."""
        return self.n_quantized / max(1, self.n_parameters)

    def to_json(self) -> dict[str, Any]:
        """Return what `result.json` says."""
        left = [weight._asdict() for weight in self.left]
        return {"quantized_frac": self.quantized_frac, "n_parameters": self.n_parameters, "left_in_float": left}

    def problems(self, include: Sequence[str], exclude: Sequence[str]) -> str:
        """Return in words what is left in float although the patterns ask for it; empty if nothing is."""
        asked = [
            weight
            for weight in self.left
            if weight.reason != NOT_SELECTED
            and (not include or any(matches(weight.name, pattern) for pattern in include))
            and not any(matches(weight.name, pattern) for pattern in exclude)
        ]
        others = sum(weight.n_weights for weight in asked if weight.reason == OTHER)
        if others <= MAX_OTHER_FRAC * self.n_parameters:
            asked = [weight for weight in asked if weight.reason != OTHER]
        if not asked:
            return ""
        lines = [
            f"'{one.name}' ({one.reason}, {one.n_weights / self.n_parameters:.1%} of the parameters)" for one in asked
        ]
        more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
        return f"left in float: {', '.join(lines[:8])}{more}; quantized are {self.quantized_frac:.1%} of the parameters"


def coverage(model: nn.Module, covered: Iterable[nn.Parameter], own: Iterable[nn.Parameter] = ()) -> Coverage:
    """Return how much of a model is quantized.

    Args:
        model: with or without quantizers.
        covered: the weights that are or will be quantized.
        own: parameters of the quantizers, which do not count.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
        >>> coverage(model, [model[0].weight]).left
        (FloatWeight(name='1', n_weights=16, reason='parametrized by _WeightNorm'),)
    """
    quantized = {id(weight): weight.numel() for weight in covered}
    ignored = {id(parameter) for parameter in own}
    selectable = {id(layer.weight) for layer in find_layers(model)}
    left: list[FloatWeight] = []
    total = 0
    seen: set[int] = set()
    for name, module in model.named_modules():
        for tensor_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in ignored or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            plain = id(parameter) not in quantized and parameter.ndim >= 2 and parameter.is_floating_point()
            if plain and not is_norm(module) and tensor_name not in MAGNITUDES:
                reason = NOT_SELECTED if id(parameter) in selectable else _reason(module, tensor_name)
                left.append(FloatWeight(_owner_name(name, module, tensor_name), parameter.numel(), reason))
    return Coverage(total, sum(quantized.values()), tuple(left))


def _reason(module: nn.Module, tensor_name: str) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    if isinstance(module, ParametrizationList):
        return f"parametrized by {', '.join(type(part).__name__ for part in module)}"
    if tensor_name.endswith("_orig"):
        return "pruned, or spectral_norm"
    return "weight_norm" if tensor_name in ("weight_v", "weight_g") else OTHER


def _owner_name(name: str, module: nn.Module, tensor_name: str) -> str:
    if isinstance(module, ParametrizationList):
        owner, _, tensor_name = name.rpartition("parametrizations.")
        return layer_name(owner.removesuffix("."), tensor_name)
    return layer_name(name, re.sub(r"_(orig|v|g)$", "", tensor_name))


def matches(name: str, pattern: str) -> bool:
    """Return whether a glob pattern means the layer `name`, or a module above it.

    Example:
        >>> matches("blocks.0.mlp.fc1", "blocks.*.mlp"), matches("classifier2", "classifier")
        (True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


KINDS = {
    "depthwise": "one filter per input channel (groups = input channels > 1)",
    "pointwise": "1 x 1 in every dimension, of all input channels",
}
"""Words that mean a kind of convolution wherever a pattern stands, beside the layers that bear such a name."""


def kind_of(module: nn.Module) -> str:
    """Return the kind of `KINDS` that a layer is of, "" for none.

    Example:
        >>> kind_of(nn.Conv2d(8, 8, 3, groups=8)), kind_of(nn.Conv2d(8, 4, 1)), kind_of(nn.Linear(8, 4))
        ('depthwise', 'pointwise', '')
    """
    kernel, groups = getattr(module, "kernel_size", None), getattr(module, "groups", None)
    if not isinstance(kernel, tuple) or not isinstance(groups, int):
        return ""
    if groups == getattr(module, "in_channels", 0) > 1:
        return "depthwise"
    return "pointwise" if groups == 1 and all(size == 1 for size in kernel) else ""


def means(pattern: str, layer: Layer) -> bool:
    """Return whether a pattern means a layer: by its kind (`KINDS`), or as `matches` does by its name."""
    return kind_of(layer.module) == pattern or matches(layer.name, pattern)


def check_pattern(pattern: str, names: Sequence[str]) -> None:
    """Refuse a pattern that means none of the layers `names`; a kind of `KINDS` may mean none.

    Raises:
        ConfigError: naming the nearest layer or module.
    """
    if pattern not in KINDS and not any(matches(name, pattern) for name in names):
        raise ConfigError(unknown("layer pattern", pattern, [*_names(names), *KINDS]))


def select_layers(
    layers: Sequence[Layer],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    others: Sequence[FloatWeight] = (),
) -> list[Layer]:
    """Return the layers that some `include` pattern means (all if there is none) and no `exclude` pattern means.

    Args:
        layers: to choose from.
        include: glob patterns of layer names, or kinds (`KINDS`).
        exclude: likewise.
        others: weights that cannot be quantized, which a pattern may mean too.

    Raises:
        ConfigError: a pattern that means no layer (with the nearest name), or no layer is left.
    """
    for pattern in (*include, *exclude):
        check_pattern(pattern, [*(layer.name for layer in layers), *(other.name for other in others)])
    chosen = [
        layer
        for layer in layers
        if (not include or any(means(pattern, layer) for pattern in include))
        and not any(means(pattern, layer) for pattern in exclude)
    ]
    if not chosen:
        text = f"no layer is left to quantize: {len(layers)} found, include {list(include)}, exclude {list(exclude)}"
        stay = [f"'{other.name}' ({other.reason})" for other in others if other.reason not in (NOT_SELECTED, OTHER)]
        raise ConfigError(f"{text}; in float stay {', '.join(stay[:8])}" if stay else text)
    return chosen


def _names(names: Sequence[str]) -> list[str]:
    """Return the names of the layers and of every module above one: what a pattern can mean."""
    parts = [name.split(".") for name in names]
    return sorted({".".join(name[: depth + 1]) for name in parts for depth in range(len(name))})
