"""Attach quantizers to a model at step 0, enable them at the start step."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized, register_parametrization
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from qtdog.conversion.layers import (
    Coverage,
    Layer,
    check_pattern,
    coverage,
    find_layers,
    is_weight_name,
    layer_name,
    means,
    select_layers,
)
from qtdog.conversion.load import check_fits, load_state_, without_wrapper
from qtdog.core.errors import ConfigError, ModelError, unknown
from qtdog.core.quantized import MAX_BITS, MIN_BITS
from qtdog.core.random import derive
from qtdog.packing.layout import DTYPE_NAMES
from qtdog.packing.packed_file import load_packed
from qtdog.quantizers.activations import CHILD, ActivationGrid, ActivationQuantizer
from qtdog.quantizers.base import OPTION_NAMES, Quantizer, QuantizerOptions
from qtdog.quantizers.computed_weight import guard_
from qtdog.quantizers.lsq_groups import WeightGroups
from qtdog.quantizers.registry import QUANTIZERS, check_options, works_after_training

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


def sites(model: nn.Module) -> list[Site]:
    """Return every quantized weight of a model, a shared one once per name that it has."""
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" not in module._modules or not is_parametrized(module):  # the first alone takes less time
            continue
        lists: Any = module.parametrizations
        for tensor_name, parametrizations in lists.items():
            if is_weight_name(tensor_name) and isinstance(parametrizations[0], Quantizer):
                dot = f"{name}." if name else ""
                site = Site(
                    name=layer_name(name, tensor_name),
                    plain_name=dot + tensor_name,
                    prefix=f"{dot}parametrizations.{tensor_name}.",
                    quantizer=parametrizations[0],
                    weight=parametrizations.original,
                )
                found.append(site)
    return found


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
        return all(map(attrgetter("enabled"), self.layers.values()))

    @property
    def packs(self) -> bool:
        """Whether some weight lies on a grid now, so that a file saved now holds codes."""
        return any(map(attrgetter("packs"), self.layers.values()))

    @property
    def selectable(self) -> bool:
        """Whether a checkpoint taken now may be selected: enabled, and INQ has frozen its last weight."""
        return all(map(attrgetter("selectable"), self.layers.values()))

    def enable(self) -> None:
        """Initialize the step sizes from the current weights and quantize from now on; again, it does nothing.

        Raises:
            ModelError: a weight that is not finite, sharded or on the meta device; no quantizer has been enabled then.
        """
        waiting = [site for site in sites(self.model) if not site.quantizer.enabled]
        if waiting:
            refuse_sharded(self.model)
        for site in waiting:
            if site.weight.is_meta:
                raise ModelError(f"the weight of layer '{site.name}' has no values yet (device meta): load them first")
            if not torch.isfinite(site.weight).all():
                raise ModelError(f"the weight of layer '{site.name}' is not finite, so it can have no step size")
        thawed = [site for site in waiting if site.quantizer.follow_(site.weight)]
        if thawed:
            _watch(self.model)
        for site in waiting:
            if not site.quantizer.enabled:  # a shared one is enabled already
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

    def groups(self) -> WeightGroups:
        """Return a context for the forward passes of training, in which LSQ's layers are quantized group by group.

        Values and gradients are the same, bit for bit, and take less time. Keep it for all steps of a loop.

        Example:
            >>> model = nn.Linear(4, 2)
            >>> quantizers = attach(model, bits=4)
            >>> groups = quantizers.groups()
            >>> with groups:
            ...     loss = model(torch.ones(1, 4)).sum()
        """
        return WeightGroups(self.model)

    def set_enabled(self, enabled: bool) -> None:
        """Say whether weights are quantized, leaving the step sizes as they are.

        A state dict says it too; this is for one from before it did.
        """
        for quantizer in self.layers.values():
            quantizer.enabled = enabled

    def weights_(self) -> dict[str, nn.Parameter]:
        """Return the weights behind the quantizers by layer name: what to change in place (LoRA merge, pruning, init).

        `layer.weight` of an enabled layer is computed anew at each use; a change of that would be lost, and raises.

        Raises:
            ModelError: a quantizer holds codes, so that a change of its weight would have no effect.

        Example:
            >>> layer = nn.Linear(2, 2)
            >>> quantizers = attach(layer, bits=4)
            >>> quantizers.enable()
            >>> with torch.no_grad():
            ...     for weight in quantizers.weights_().values():
            ...         _ = weight.mul_(0)
            >>> bool((layer.weight == 0).all())
            True
        """
        found = {}
        for site in sites(self.model):
            if site.quantizer.holds_codes:
                kind = type(site.quantizer).__name__
                raise ModelError(
                    f"layer '{site.name}' is kept as codes by {kind}: a change of its weight has no effect"
                )
            found[site.name] = site.weight
        return found

    @property
    def coverage(self) -> Coverage:
        """How much of the model is quantized, and what stays in float."""
        found = sites(self.model)
        own = [parameter for site in found for parameter in site.quantizer.parameters()]
        return coverage(self.model, [site.weight for site in found], own)

    def step_size_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the quantizers that train, each once."""
        found = {id(p): p for quantizer in self.layers.values() for p in quantizer.parameters() if p.requires_grad}
        return list(found.values())

    def add_to(self, optimizer: Optimizer, *, step_size_lr: float = 1.0) -> None:
        """Let an optimizer that was made before `attach` train the step sizes too; those that it holds stay.

        They become a group of their own without weight decay. Do this before a learning-rate scheduler is made.

        Args:
            optimizer: holds the weights.
            step_size_lr: learning rate of the step sizes as a multiple of that of the optimizer's first group.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [parameter for parameter in self.step_size_parameters() if id(parameter) not in held]
        if missing:
            group: dict[str, Any] = {"params": missing, "lr": optimizer.param_groups[0]["lr"] * step_size_lr}
            optimizer.add_param_group(group | ({"weight_decay": 0.0} if "weight_decay" in optimizer.defaults else {}))

    def param_groups(self, lr: float, *, weight_decay: float = 0.0, step_size_lr: float = 1.0) -> list[dict[str, Any]]:
        """Return two optimizer groups: everything else that trains, and the step sizes, which never decay.

        Args:
            lr: learning rate of the weights.
            weight_decay: weight decay of the first group.
            step_size_lr: learning rate of the step sizes as a multiple of `lr`.
        """
        step_sizes = self.step_size_parameters()
        own = {id(p) for quantizer in self.layers.values() for p in quantizer.parameters()}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        return [
            {"params": rest, "lr": lr, "weight_decay": weight_decay},
            {"params": step_sizes, "lr": lr * step_size_lr, "weight_decay": 0.0},
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
    like: Path | str | None = None,
    **options: Any,
) -> Attached:
    """Attach a quantizer to every selected layer; weights pass through untouched until `Attached.enable()`.

    The Parameter objects stay the same, so an optimizer made before still trains the weights. It lacks the step sizes:
    make it after with `Attached.param_groups`, or add them with `Attached.add_to`. A warning says so at the second
    update of an optimizer that trains an enabled weight without its step size. Nothing else may compute the weight from
    then on: masks, norms and parametrizations on top of a quantizer are refused with the layer's name.

    With `like`, tuning goes on from a file that `save` wrote: the model gets the packed file's weights, the layers that
    it quantizes get its codes, step sizes and bits, and the quantizers are enabled at once.

    Args:
        model: the model, changed in place.
        bits: bits per weight, 2 to 8.
        layer_bits: bits of the layers that a glob pattern or a kind ("depthwise", "pointwise") means, like
            `{"blocks.0": 8}`; of several that mean a layer the last one counts.
        granularity: one step size per output "channel" or per "layer".
        include: glob patterns of layer names, or kinds; empty means every layer.
        exclude: glob patterns of layer names, or kinds, left in float; a module's name covers everything below it.
        quantizer: a name of `qtdog.quantizers.registry.QUANTIZERS`.
        like: a packed model file to go on from; it says the layers, the bits and the granularity.
        options: fields of `qtdog.quantizers.base.QuantizerOptions`, such as `step_mode="raw"`.

    Raises:
        ConfigError: an unknown name or value, a pattern that means no layer, a weight shared by a selected and an
            unselected layer, a model that carries quantizers already or is sharded (FSDP), an embedding that changes
            its weight (`max_norm`) or has sparse gradients, or a state dict that no file could hold (complex numbers,
            NaN, something that is no tensor).
        ModelError, FormatError: the file of `like` does not fit the model, or is none.

    Warns:
        UserWarning: naming the weights that stay in float although the patterns ask for them (parametrized, pruned or
            scripted layers), with their share of the parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> quantizers = attach(model, bits=4, exclude=["2"])
        >>> list(quantizers.layers)
        ['0']
        >>> quantizers.enable()
        >>> model[0].weight.unique().numel() <= 8 * 16
        True
    """
    _checked_granularity(granularity)
    if sites(model):
        raise ConfigError("the model carries quantizers already; find them with attached(model)")
    refuse_sharded(model)
    _refuse_unsavable(model)
    if like is not None:
        if (bits, layer_bits, granularity, tuple(include), tuple(exclude)) != (7, None, "channel", (), ()):
            raise ConfigError("with like=FILE the file says layers, bits and granularity; leave those arguments out")
        return _attach_like(model, like, quantizer, options)
    checked = _checked_options(quantizer, options)
    layers = find_layers(model)
    others = coverage(model, [layer.weight for layer in layers]).left
    chosen = select_layers(layers, include, exclude, others)
    _refuse_half_tied(model, chosen)
    bits_of = bits_per_layer(chosen, _checked_bits(bits), layer_bits or {})
    made: dict[int, Quantizer] = {}
    for layer in chosen:
        _refuse_embedding(layer, quantizer)
        if id(layer.weight) not in made:
            spec = layer.spec(bits_of[layer.name], granularity)
            made[id(layer.weight)] = QUANTIZERS[quantizer].make(layer.weight, spec, checked)
    for layer in chosen:
        _register_(layer, made[id(layer.weight)])
    found = Attached(model)
    left = found.coverage.problems(include, exclude)
    if left:
        warnings.warn(f"{left}. Name them in exclude to say that this is meant", stacklevel=2)
    _watch(model)
    return found


def _attach_like(model: nn.Module, like: Path | str, quantizer: str, options: dict[str, Any]) -> Attached:
    packed = without_wrapper(load_packed(like), model)
    check_fits(packed, model, like)
    layers = {layer.plain_name: layer for layer in find_layers(model)}
    unknown_names = sorted(packed.quantized.keys() - layers.keys())
    if unknown_names or not packed.quantized:
        what = f"'{unknown_names[0]}', which is no layer of the model" if unknown_names else "nothing"
        raise ModelError(f"{like} quantizes {what}")
    chosen = [layers[name] for name in packed.quantized]
    _refuse_half_tied(model, chosen)
    made: dict[int, Quantizer] = {}
    for name, layer in zip(packed.quantized, chosen, strict=True):
        _refuse_embedding(layer, quantizer)
        spec = packed.quantized[name].spec
        if id(layer.weight) not in made:
            range_ = {"range": "symmetric"} if spec.levels == "symmetric" else {}
            checked = _checked_options(quantizer, range_ | options)
            made[id(layer.weight)] = QUANTIZERS[quantizer].make(layer.weight, spec, checked)
            made[id(layer.weight)].check_grid(packed.quantized[name], spec.n_scales(layer.weight.shape))
    load_state_(packed, model, like)
    for name, layer in zip(packed.quantized, chosen, strict=True):
        own, value = made[id(layer.weight)], packed.quantized[name]
        device = layer.weight.device
        _register_(layer, own)
        if not own.enabled:
            own.resume_(replace(value, codes=value.codes.to(device), scale=value.scale.to(device)))
    _watch(model)
    return Attached(model)


def _register_(layer: Layer, quantizer: Quantizer) -> None:
    quantizer.follow_(layer.weight)
    register_parametrization(layer.module, layer.tensor_name, quantizer.to(layer.weight.device))
    guard_(layer.module, layer.tensor_name, layer.name)


def attached(model: nn.Module) -> Attached:
    """Return the quantizers that a model carries.

    Raises:
        ConfigError: it carries none.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> attach(model, bits=4).enable()
        >>> attached(model).enabled, list(attached(model).layers)
        (True, ['0', '1'])
    """
    if not sites(model):
        raise ConfigError("the model carries no quantizers; attach(model) first")
    return Attached(model)


def _checked_bits(bits: int) -> int:
    if not isinstance(bits, Integral) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, not {bits!r}")
    return int(bits)


def bits_per_layer(layers: Sequence[Layer], bits: int, layer_bits: Mapping[str, int]) -> dict[str, int]:
    """Return the bits of each layer by name: `bits`, or those of the last pattern that means it.

    Raises:
        ConfigError: a pattern that means no layer (with the nearest name), bits out of range, or a weight that two
            layers share and that would have two bit-widths.
    """
    for pattern in layer_bits:
        check_pattern(pattern, [layer.name for layer in layers])
    table = {layer.name: bits for layer in layers}
    for pattern, given in layer_bits.items():
        checked = _checked_bits(given)
        table |= {layer.name: checked for layer in layers if means(pattern, layer)}
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


# What torch shards a model with. A model can only be sharded if these modules have been imported, which takes seconds.
SHARDING = {
    "torch.distributed.fsdp": ("FullyShardedDataParallel", "FSDPModule"),
    "torch.distributed.tensor": ("DTensor",),
}


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model whose weights are spread over several processes.

    Raises:
        ConfigError: FSDP (1 or 2) or tensor parallelism has sharded it.
    """
    kinds = tuple(
        getattr(sys.modules[place], name)
        for place, names in SHARDING.items()
        if place in sys.modules
        for name in names
        if hasattr(sys.modules[place], name)
    )
    if not kinds:
        return
    for name, module in model.named_modules():
        if isinstance(module, kinds) or any(isinstance(value, kinds) for value in module._parameters.values()):
            raise ConfigError(
                f"'{name or type(module).__name__}' is sharded (FSDP or tensor parallelism): a step size needs the "
                "whole weight. Use DistributedDataParallel, which keeps weights whole"
            )


def _refuse_embedding(layer: Layer, quantizer: str) -> None:
    if getattr(layer.module, "max_norm", None) is not None:
        raise ConfigError(
            f"layer '{layer.name}' rescales its weight at each use (max_norm): exclude it or unset max_norm"
        )
    if getattr(layer.module, "sparse", False) and not works_after_training(quantizer):
        raise ConfigError(f"layer '{layer.name}' has sparse gradients, which do not pass a quantizer: set sparse=False")


def _refuse_unsavable(model: nn.Module) -> None:
    """Refuse at once what `save` would refuse after hours of training."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"'{name}' in the model's state dict is no tensor but {type(value).__name__}: no file holds it"
            )
        if is_lazy(value):
            continue  # `find_layers` says what to do
        if value.layout != torch.strided:
            raise ConfigError(f"'{name}' is {value.layout}, which the packed file cannot hold: make it a dense tensor")
        if value.dtype not in DTYPE_NAMES:
            raise ConfigError(
                f"'{name}' is {value.dtype}, which the packed file cannot hold: make the buffer persistent=False"
            )
        if value.is_floating_point() and not value.is_meta and torch.isnan(value).any():
            raise ConfigError(f"'{name}' holds NaN, which the packed file cannot hold")


class _StepSizeWatch:
    """Warns if an optimizer trains enabled weights and none trains their step sizes; gone as soon as all are held."""

    def __init__(self, model: nn.Module) -> None:
        self._watched = [
            (site.name, weakref.ref(site.quantizer), weakref.ref(site.weight))
            for site in sites(model)
            if any(parameter.requires_grad for parameter in site.quantizer.parameters())
        ]
        self._stepped: set[int] = set()

    def after_step(self, optimizer: Optimizer) -> bool:
        """Return whether to go on watching."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        waiting, names = [], []
        for name, quantizer_ref, weight_ref in self._watched:
            quantizer, weight = quantizer_ref(), weight_ref()
            if quantizer is None or weight is None:
                continue
            if all(id(value) in held or not value.requires_grad for value in quantizer.parameters()):
                continue
            waiting.append((name, quantizer_ref, weight_ref))
            if id(weight) in held and quantizer.enabled:
                names.append(name)
        self._watched = waiting
        warn = bool(names) and id(optimizer) in self._stepped  # another optimizer may hold them: wait one update
        if names:
            self._stepped.add(id(optimizer))
        if warn:
            warnings.warn(
                f"the step sizes of {len(names)} quantized layers ('{names[0]}', …) are in no optimizer, so they never "
                "train: call add_to(optimizer) of what attach returned, or make the optimizer from its param_groups()",
                stacklevel=4,
            )
        return bool(waiting) and not warn


_WATCHES: list[_StepSizeWatch] = []


def _watch(model: nn.Module) -> None:
    if not _HOOKED:
        _HOOKED.append(register_optimizer_step_post_hook(_after_step))
    _WATCHES.append(_StepSizeWatch(model))


_HOOKED: list[Any] = []  # registered once: torch allows no hook to remove itself


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _WATCHES:
        _WATCHES[:] = [watch for watch in _WATCHES if watch.after_step(optimizer)]


def input_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers whose `weight` is quantized, by name: layers with one input."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and is_parametrized(module, "weight")
        and isinstance(module.get_submodule("parametrizations.weight.0"), Quantizer)
    }


def activation_grids(model: nn.Module) -> dict[str, ActivationGrid]:
    """Return the grids of the inputs of a model's layers, by name; {} where activations stay float."""
    found = {}
    for name, module in input_layers(model).items():
        own = getattr(module.get_submodule("parametrizations.weight.0"), CHILD, None)
        if isinstance(own, ActivationQuantizer) and own.started.item():
            found[name] = own.grid()
    return found
