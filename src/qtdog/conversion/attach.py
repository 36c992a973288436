"""Attach quantizers to a model at step 0, enable them at the start step; which layers are quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from qtdog.core.errors import ConfigError, unknown
from qtdog.core.quantized import MAX_BITS, MIN_BITS, QuantSpec
from qtdog.core.random import derive
from qtdog.quantizers.base import OPTION_NAMES, Quantizer, QuantizerOptions
from qtdog.quantizers.registry import QUANTIZERS, check_options

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


GRANULARITIES = ("channel", "layer")


class Site(NamedTuple):
    """A weight with its quantizer, under one of its names.

    Attributes:
        name: the layer's name, as in patterns and reports.
        plain_name: the weight's name in the state dict of the plain model.
        prefix: what precedes its tensors in the state dict of the attached model.
        quantizer: its quantizer.
        weight: the Parameter that trains.
    """

    name: str
    plain_name: str
    prefix: str
    quantizer: Quantizer
    weight: nn.Parameter


def sites(model: nn.Module) -> Iterator[Site]:
    """Yield every quantized weight of a model, a shared one once per name that it has."""
    for name, module in model.named_modules(remove_duplicate=False):
        for tensor_name in WEIGHT_NAMES:
            if not is_parametrized(module, tensor_name):
                continue
            parametrizations: Any = module.get_submodule(f"parametrizations.{tensor_name}")
            if isinstance(parametrizations[0], Quantizer):
                dot = f"{name}." if name else ""
                prefix = f"{dot}parametrizations.{tensor_name}."
                label = layer_name(name, tensor_name)
                yield Site(label, dot + tensor_name, prefix, parametrizations[0], parametrizations.original)


@dataclass(frozen=True)
class Attached:
    """The quantizers of a model, found in it anew at every use.

    Attributes:
        model: the model that carries them.
    """

    model: nn.Module

    @property
    def layers(self) -> dict[str, Quantizer]:
        """Layer name to quantizer, in the order of the model; layers that share a weight share the quantizer."""
        return {site.name: site.quantizer for site in sites(self.model)}

    @property
    def enabled(self) -> bool:
        """Whether every quantizer is enabled."""
        return all(quantizer.enabled for quantizer in self.layers.values())

    @property
    def packs(self) -> bool:
        """Whether some weight lies on a grid now, so that a file saved now holds codes."""
        return any(quantizer.packs for quantizer in self.layers.values())

    @property
    def shippable(self) -> bool:
        """Whether a checkpoint taken now may be selected: enabled, and INQ has frozen its last weight."""
        return all(quantizer.shippable for quantizer in self.layers.values())

    def enable(self) -> None:
        """Initialise the step sizes from the current weights and quantize from now on; again, it does nothing."""
        for site in sites(self.model):
            if not site.quantizer.enabled:
                site.quantizer.enable_(site.weight)

    def begin_step(self, seed: int, progress: float) -> None:
        """Prepare the enabled quantizers for one update.

        Noise and stochastic rounding draw from `seed`, INQ follows `progress`; the others ignore both. A loop of one's
        own that uses one of these calls this before every forward pass of training.

        Args:
            seed: of this step; each layer derives its own from it.
            progress: share of the quantized steps that are done, 0 at the first and below 1 at the last.
        """
        seen: set[int] = set()
        for site in sites(self.model):
            if site.quantizer.enabled and id(site.quantizer) not in seen:
                seen.add(id(site.quantizer))
                site.quantizer.begin_step_(site.weight, derive(seed, site.name), progress)

    def set_enabled(self, enabled: bool) -> None:
        """Say whether weights are quantized, leaving the step sizes as they are: for restoring a checkpoint."""
        for quantizer in self.layers.values():
            quantizer.enabled = enabled

    def param_groups(self, lr: float, *, weight_decay: float = 0.0, step_size_lr: float = 1.0) -> list[dict[str, Any]]:
        """Return two optimizer groups: everything else that trains, and the step sizes, which never decay.

        Args:
            lr: learning rate of the weights.
            weight_decay: weight decay of the first group.
            step_size_lr: learning rate of the step sizes as a multiple of `lr`.
        """
        step_sizes = {id(p): p for quantizer in self.layers.values() for p in quantizer.parameters()}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in step_sizes]
        return [
            {"params": rest, "lr": lr, "weight_decay": weight_decay},
            {"params": list(step_sizes.values()), "lr": lr * step_size_lr, "weight_decay": 0.0},
        ]


def attach(
    model: nn.Module,
    *,
    bits: int = 7,
    layer_bits: Mapping[str, int] | None = None,
    granularity: str = "channel",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    quantizer: str = "lsq",
    **options: Any,
) -> Attached:
    """Attach a quantizer to every selected layer; weights pass through untouched until `Attached.enable()`.

    The Parameter objects stay the same, so an optimizer made before or after holds what trains.

    Args:
        model: the model, changed in place.
        bits: bits per weight, 2 to 8.
        layer_bits: bits of the layers that a glob pattern means, like `{"blocks.0": 8}`; of several patterns that mean
            a layer the last one counts.
        granularity: one step size per output "channel" or per "layer".
        include: glob patterns of layer names; empty means every layer.
        exclude: glob patterns of layer names left in float; a module's name covers everything below it.
        quantizer: a name of `qtdog.quantizers.registry.QUANTIZERS`.
        options: fields of `qtdog.quantizers.base.QuantizerOptions`, such as `step_mode="raw"`.

    Raises:
        ConfigError: an unknown name or value, a pattern that means no layer, a weight shared by a selected and an
            unselected layer, or a model that carries quantizers already.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> quantizers = attach(model, bits=4, exclude=["2"])
        >>> list(quantizers.layers)
        ['0']
        >>> quantizers.enable()
        >>> model[0].weight.unique().numel() <= 8 * 16
        True
    """
    per_channel = _checked_granularity(granularity) == "channel"
    checked = _checked_options(quantizer, options)
    if next(sites(model), None) is not None:
        raise ConfigError("the model carries quantizers already; find them with attached(model)")
    make = QUANTIZERS[quantizer].make
    chosen = select(find_layers(model), include, exclude)
    _refuse_half_tied(model, chosen)
    bits_of = bits_per_layer(chosen, _checked_bits(bits), layer_bits or {})
    made: dict[int, Quantizer] = {}
    for layer in chosen:
        weight = layer.weight
        if id(weight) not in made:
            spec = QuantSpec(bits_of[layer.name], layer.axis if per_channel else None)
            made[id(weight)] = make(weight, spec, checked)
        register_parametrization(layer.module, layer.tensor_name, made[id(weight)])
    return Attached(model)


def attached(model: nn.Module) -> Attached:
    """Return the quantizers that a model carries.

    Raises:
        ConfigError: it carries none.
    """
    if next(sites(model), None) is None:
        raise ConfigError("the model carries no quantizers; attach(model) first")
    return Attached(model)


def _checked_bits(bits: int) -> int:
    if not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, not {bits}")
    return bits


def bits_per_layer(layers: Sequence[Layer], bits: int, layer_bits: Mapping[str, int]) -> dict[str, int]:
    """Return the bits of each layer by name: `bits`, or those of the last pattern that means it.

    Raises:
        ConfigError: a pattern that means no layer (with the nearest name), bits out of range, or a weight that two
            layers share and that would have two bit-widths.
    """
    for pattern, given in layer_bits.items():
        check_pattern(pattern, layers)
        _checked_bits(given)
    table = {layer.name: bits for layer in layers}
    for pattern, given in layer_bits.items():
        table |= {layer.name: given for layer in layers if matches(layer.name, pattern)}
    first: dict[int, Layer] = {}
    for layer in layers:
        other = first.setdefault(id(layer.weight), layer)
        if table[other.name] != table[layer.name]:
            raise ConfigError(f"'{other.name}' and '{layer.name}' share one weight and need the same bits")
    return table


def _checked_options(quantizer: str, options: Mapping[str, Any]) -> QuantizerOptions:
    for name in options:
        if name not in OPTION_NAMES:
            raise ConfigError(unknown("quantizer option", name, OPTION_NAMES))
    made = QuantizerOptions(**options)
    check_options(quantizer, made)
    return made


def _checked_granularity(granularity: str) -> str:
    if granularity not in GRANULARITIES:
        raise ConfigError(unknown("granularity", granularity, GRANULARITIES))
    return granularity


def _refuse_half_tied(model: nn.Module, chosen: Sequence[Layer]) -> None:
    """Refuse a weight that is quantized under one name and float under another: no plain model could hold both."""
    selected = {(id(layer.module), layer.tensor_name) for layer in chosen}
    weights = {id(layer.weight): layer.name for layer in chosen}
    for name, module in model.named_modules():
        for tensor_name, parameter in module._parameters.items():
            if id(parameter) in weights and (id(module), tensor_name) not in selected:
                other = layer_name(name, tensor_name)
                raise ConfigError(
                    f"'{weights[id(parameter)]}' and '{other}' share one weight, and only the first is to be "
                    "quantized; include or exclude both"
                )
