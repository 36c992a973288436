"""LSQ of several layers in one call: in small networks most of its time goes into the calls, not into the weights.

The values and gradients are those of `LSQ`, bit for bit: the same operations on the same tensors, but one autograd
function for a group of layers, with their step sizes inside, in place of some six per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qtdog.core.quantized import scale_shape
from qtdog.quantizers.base import is_transformed
from qtdog.quantizers.computed_weight import TOGETHER
from qtdog.quantizers.lsq import BLOCK, LSQ, mask

_each: Any = torch  # whose functions over lists have no public names; its optimizers use them too
GROUP = 2**19
"""Weights of a group at most. Larger groups leave a processor's cache; smaller ones save fewer calls."""


@dataclass
class _Group:
    """Layers that are quantized together, and what one forward pass has not used yet of what was computed.

    Attributes:
        lists: the parametrizations of each layer's weight.
        shapes: those of its step sizes that broadcast to it.
        made: the computed weights by position; None before the first is asked for.
        with_gradients: whether they were computed with gradients.
    """

    lists: list[Any]
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    made: dict[int, Tensor] | None = None
    with_gradients: bool = False


class WeightGroups:
    """While its context is open, the LSQ layers of a model are quantized group by group, as the first of each is used.

    A computed weight is handed out once; whatever is used again, or is in no group (other quantizers, stochastic
    rounding, raw and frozen step sizes, shared weights, averages of step sizes), is computed alone.

    Args:
        model: quantizers are attached to it; later ones are not seen.

    `qtdog.conversion.attach.Attached.groups` makes one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[nn.Module, tuple[_Group, int]] = {}
        self._groups: list[_Group] = []
        self._tokens: list[Any] = []
        found = list(_lists(model))
        used = [id(entry[0]) for entry in found]
        size = 0
        for entry in found:
            n = entry.original.numel()
            if used.count(id(entry[0])) > 1 or not 0 < n <= BLOCK:  # a weight of several layers; one in blocks
                continue
            if not self._groups or size + n > GROUP:
                self._groups.append(_Group([]))
                size = 0
            size += n
            group = self._groups[-1]
            self._places[entry] = group, len(group.lists)
            group.lists.append(entry)
            group.shapes.append(scale_shape(entry.original.ndim, entry[0].spec.axis))

    def __enter__(self) -> WeightGroups:
        """Quantize by groups from now on."""
        self._tokens.append(TOGETHER.set(self.take))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of what was computed and not used."""
        TOGETHER.reset(self._tokens.pop())
        for group in self._groups:
            group.made = None

    def take(self, entry: nn.Module) -> Tensor | None:
        """Return the weight that a list of parametrizations computes, or None if it is to compute it alone."""
        place = self._places.get(entry)
        if place is None or torch.is_inference_mode_enabled():
            return None
        group, index = place
        if group.made is None:
            _compute_(group, index)
        made = group.made
        if not made or group.with_gradients != torch.is_grad_enabled():
            return None
        return made.pop(index, None)


def _lists(model: nn.Module) -> Any:
    """Yield the parametrization lists of LSQ layers that can be in a group, in the order of the model."""
    for module in model.modules():
        lists: Any = getattr(module, "parametrizations", None)
        entries: list[Any] = list(lists.values()) if isinstance(lists, nn.ModuleDict) else []
        for entry in entries:
            quantizer = entry[0]
            if isinstance(quantizer, LSQ) and quantizer.step_mode == "log" and quantizer.spec.groups == 1:
                yield entry


def _compute_(group: _Group, asked: int) -> None:
    """Quantize those layers of a group that are as the one that is asked for."""
    group.made, group.with_gradients = {}, torch.is_grad_enabled()
    kind, weights, logs, places = None, [], [], []
    for index in [asked, *(index for index in range(len(group.lists)) if index != asked)]:
        entry = group.lists[index]
        quantizer = entry._modules["0"]
        weight, log_scale = entry._parameters["original"], quantizer._parameters["log_scale"]
        own = _kind(quantizer, weight, log_scale)
        if own is None or (kind is not None and own != kind):
            if index == asked:
                return
            continue
        kind = own
        places.append(index)
        weights.append(weight)
        logs.append(log_scale)
    quantizers = [group.lists[index]._modules["0"] for index in places]
    plan = _Plan(
        [(quantizer.spec.qmin, quantizer.spec.qmax) for quantizer in quantizers],
        [group.shapes[index] for index in places],
    )
    values = _QuantizeGroup.apply(plan, *weights, *logs)
    group.made.update(zip(places, values, strict=True))


def _kind(quantizer: LSQ, weight: Tensor | None, log_scale: Tensor | None) -> tuple[Any, ...] | None:
    """Return what layers of a call have in common, or None for a layer that is computed alone."""
    if weight is None or log_scale is None or not (weight.dtype == log_scale.dtype == torch.float32):
        return None
    stochastic = quantizer.training and quantizer.rounding == "stochastic"
    if stochastic or not quantizer.enabled or quantizer.is_average or quantizer._forward_hooks:
        return None
    if is_transformed(weight) or is_transformed(log_scale):
        return None
    return weight.device, weight.requires_grad, log_scale.requires_grad


@dataclass(frozen=True)
class _Plan:
    ends: Sequence[tuple[int, int]]
    shapes: Sequence[tuple[int, ...]]


class _QuantizeGroup(Function):
    """`lsq_quantize` with exp of the logarithms of the step sizes, for several weights."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(plan.ends)
        weights = tensors[:n]
        scales = _each._foreach_exp(tensors[n:])
        steps = [scale.reshape(shape) for scale, shape in zip(scales, plan.shapes, strict=True)]
        results = [torch.empty_like(weight) for weight in weights]
        for weight, step, result in zip(weights, steps, results, strict=True):
            torch.div(weight, step, out=result)
        ctx.clipped = _may_leave(results, plan.ends)
        for index in ctx.clipped:
            results[index].clamp_(*plan.ends[index])
        _each._foreach_round_(results)
        _each._foreach_add_(results, 0.0)  # makes -0 the 0 that an integer code is
        _each._foreach_mul_(results, steps)
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # a layer that a pass leaves out gets no gradient, not one of zeros
        ctx.save_for_backward(*weights, *scales, *results)
        return tuple(results)

    @staticmethod
    @once_differentiable  # its type makes ctx positional-only
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n = len(grad_outputs)
        saved = ctx.saved_tensors
        of_weights: list[Tensor | None] = list(grad_outputs)
        of_scales: list[Tensor | None] = [None] * n
        used = [index for index in range(n) if grad_outputs[index] is not None]
        learned = used if any(ctx.needs_input_grad[1 + n :]) else []
        insides: list[Tensor] = [saved[index] for index in used]
        steps = [saved[n + index].reshape(ctx.plan.shapes[index]) for index in used]
        for place, index in enumerate(used):
            if index in ctx.clipped:
                grad, ends = grad_outputs[index], ctx.plan.ends[index]
                ratio = insides[place] / steps[place]
                of_weights[index] = torch.empty_like(insides[place])
                mask.grad_input(grad, ratio, *ends, grad_input=of_weights[index])
                insides[place] = mask.grad_input(insides[place], ratio, *ends, grad_input=ratio)
        if learned:
            errors = _each._foreach_sub([saved[2 * n + index] for index in used], insides)
            _each._foreach_mul_(errors, [grad for grad in grad_outputs if grad is not None])
            sums = [error.sum_to_size(step.shape) for error, step in zip(errors, steps, strict=True)]
            _each._foreach_add_(sums, 0.0)  # as a sum that begins at zero
            _each._foreach_div_(sums, steps)
            scales = [saved[n + index] for index in used]
            flat = [value.reshape(scale.shape) for value, scale in zip(sums, scales, strict=True)]
            _each._foreach_mul_(flat, scales)  # the gradient of exp
            for index, value in zip(used, flat, strict=True):
                of_scales[index] = value
        return None, *of_weights, *of_scales


def _may_leave(ratios: Sequence[Tensor], ends: Sequence[tuple[int, int]]) -> list[int]:
    """Return the positions of those of which some value may lie on or beyond an end; on a GPU all, without looking."""
    if ratios[0].device.type != "cpu":
        return list(range(len(ratios)))
    extremes = [value for ratio in ratios for value in (ratio.amin(), ratio.amax())]
    found = torch.stack(extremes).tolist()
    return [
        index
        for index, (qmin, qmax) in enumerate(ends)
        if not (found[2 * index] > qmin and found[2 * index + 1] < qmax)
    ]
