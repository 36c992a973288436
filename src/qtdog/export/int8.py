"""INT8 activations: which tensors of a graph become integers, their ranges on source images, Q and DQ nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtdog.core.progress import Progress
from qtdog.export.integer_weight import SAFE, IntegerWeight, seven_bits
from qtdog.export.onnx_graph import LINEAR, PRODUCTS, constant, weight_sources
from qtdog.export.packed_source import library
from qtdog.quantizers.activations import ActivationGrid

CLIPS = ("Relu", "Clip")


@dataclass
class Int8Plan:
    """What is computed in integers.

    Attributes:
        nodes: convolutions and matrix products with integer weights.
        n_products: all convolutions and matrix products that have weights.
        points: the activations that are rounded, by name, in the order of the graph.
        shared: output of a pooling to its input: the two have one range, so that pooling works on the codes.
    """

    nodes: list[Any] = field(default_factory=list)
    n_products: int = 0
    points: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    def add(self, value: Any) -> None:
        """Round a value."""
        self.points.setdefault(value.name, value)


def plan_int8(model: Any, weights: Collection[str]) -> Int8Plan:
    """Return which nodes and activations of a float graph become integers.

    Rounded are the input of every product with an integer weight, and behind every convolution what its activation
    function leaves, so that convolution and rounding become one operation; further both sides and the sum where a
    convolution's output is added to something (residual connections), and max pooling. Everything else stays float:
    what has no integer weights, the outputs of matrix products (logits, attention), normalizations, softmax.

    Args:
        model: the float graph (`onnx_ir.Model`).
        weights: names of the initializers with integer codes.
    """
    plan, ends = Int8Plan(), set[str]()
    for node in model.graph:
        plan.n_products += node.op_type in PRODUCTS and weight_sources(node.inputs[1]) is not None
        if node.op_type in LINEAR and node.inputs[1].name in weights:
            plan.nodes.append(node)
            plan.add(node.inputs[0])
            if node.op_type == "Conv":
                ends.add(_end(node, plan).name)
        elif node.op_type == "Add" and _joins(node, ends):
            for value in node.inputs:
                plan.add(value)
            ends.add(_end(node, plan).name)
        elif node.op_type == "MaxPool" and node.inputs[0].name in plan.points:
            plan.add(node.outputs[0])
            before = str(node.inputs[0].name)
            plan.shared[str(node.outputs[0].name)] = plan.shared.get(before, before)
    return plan


def activation_function(value: Any) -> Any | None:
    """Return the Relu or Clip that alone takes a value, or None."""
    users = list(value.uses())
    alone = len(users) == 1 and not value.is_graph_output()
    return users[0].node if alone and users[0].node.op_type in CLIPS else None


def _end(node: Any, plan: Int8Plan) -> Any:
    """Round what a node's activation function leaves, and return it."""
    clip = activation_function(node.outputs[0])
    value = node.outputs[0] if clip is None else clip.outputs[0]
    plan.add(value)
    return value


def _joins(node: Any, ends: Collection[str]) -> bool:
    with_constant = any(value.const_value is not None for value in node.inputs)
    return not with_constant and any(value.name in ends for value in node.inputs)


Reader = Callable[[npt.NDArray[np.uint8]], Sequence[npt.NDArray[Any]]]
"""Images to the values of all points."""

N_BINS = 2048
LEVELS = 255
N_TRIES = 100
MEMORY_BYTES = 2**28


TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class ActivationRange:
    """What one activation may be: low ≤ 0 ≤ high, so that 0 has a code of its own (padding is exact).

    Attributes:
        low, high: ends of the range.
        levels: steps between them; fewer than 255 for fewer than 8 bits.
        step: width of a step where it was trained; None for the range by the levels.
    """

    low: float
    high: float
    levels: int = LEVELS
    step: float | None = None

    @property
    def scale(self) -> float:
        """Width of a step."""
        if self.step is not None:
            return self.step
        width = float(np.float32((self.high - self.low) / self.levels))
        return width if width >= TINY else 1.0  # of subnormal steps the zero point would be no code

    @property
    def zero_point(self) -> int:
        """The code of 0."""
        return round(-self.low / self.scale)


def trained_ranges(plan: Int8Plan, grids: Mapping[str, ActivationGrid]) -> dict[str, ActivationRange]:
    """Return the ranges that training gave to the inputs of products, by activation.

    Where several layers take one activation the widest of their grids is that of the graph, which rounds it once. What
    no layer takes as its input (a sum, a convolution's output before it) has no trained range.

    Args:
        plan: of the graph.
        grids: by layer name; a convolution's weight keeps the name of its layer.
    """
    found: dict[str, ActivationRange] = {}
    for node in plan.nodes:
        grid = grids.get(str(node.inputs[1].name).removesuffix(".weight"))
        if grid is None:
            continue
        name = str(node.inputs[0].name)
        name = plan.shared.get(name, name)
        ends = (grid.qmin * grid.scale, grid.qmax * grid.scale)
        made = ActivationRange(*ends, levels=grid.qmax - grid.qmin, step=grid.scale)
        if name not in found or made.high - made.low > found[name].high - found[name].low:
            found[name] = made
    return found


def calibrate_activations(
    names: Sequence[str], read: Reader, images: npt.NDArray[np.uint8], *, progress: Progress = None
) -> dict[str, ActivationRange]:
    """Return the range of each point that rounds its values with the least squared error.

    Two passes: extremes first, then a histogram of 2,048 bins between them; of the ranges that are 1 % … 100 % of the
    extremes, the one with the least mean squared error of rounding and clipping together.

    Args:
        names: of the points.
        read: returns their values.
        images: uint8 (n, H, W, C).
        progress: called with images done and to do.
    """
    size = _batch(sum(value[0].nbytes for value in read(images[:1])))
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    lows, highs = torch.zeros(len(names)), torch.zeros(len(names))
    histograms: list[Tensor] = [torch.zeros(N_BINS) for _ in names]
    for turn, part in enumerate([*parts, *parts]):
        values = [torch.from_numpy(np.ascontiguousarray(value)).reshape(-1).float() for value in read(part)]
        for index, value in enumerate(values):
            low, high = (float(bound[index]) for bound in (lows, highs))
            if turn < len(parts):
                lows[index], highs[index] = min(low, float(value.min())), max(high, float(value.max()))
            elif low < high:
                histograms[index] += torch.histc(value, N_BINS, low, high)
        if progress is not None:
            progress(turn + 1, 2 * len(parts))
    bounds = zip(names, lows.tolist(), highs.tolist(), histograms, strict=True)
    return {name: best_activation_range(histogram, low, high) for name, low, high, histogram in bounds}


def best_activation_range(histogram: Tensor, low: float, high: float) -> ActivationRange:
    """Return the part of [low, high] that rounds a histogram with the least squared error.

    Example:
        >>> counts = torch.zeros(N_BINS)
        >>> counts[:1024], counts[-1] = 1000.0, 1.0  # one value far from all others
        >>> best_activation_range(counts, 0.0, 1.0).high < 0.6
        True
    """
    if not low < high:
        return ActivationRange(low, max(high, 0.0))
    centers = torch.linspace(low, high, N_BINS + 1, dtype=torch.float64)
    centers = (centers[1:] + centers[:-1]) / 2
    weights = histogram.double()
    found = [(_error(centers, weights, low * k / N_TRIES, high * k / N_TRIES), k) for k in range(1, N_TRIES + 1)]
    part = min(found)[1] / N_TRIES
    return ActivationRange(low * part, high * part)


def _error(centers: Tensor, weights: Tensor, low: float, high: float) -> float:
    step = (high - low) / LEVELS
    clipped = centers.clamp(low, high)
    # inside a step the error is uniform: step² / 12
    return float((weights * (clipped - centers).square()).sum() + weights.sum() * step**2 / 12)


def _batch(bytes_per_image: int) -> int:
    return int(min(max(MEMORY_BYTES // max(bytes_per_image, 1), 1), 32))


MAX_BIAS = 2**30  # leaves room in the 32-bit sum for the products


def quantize_(
    model: Any, plan: Int8Plan, weights: Mapping[str, IntegerWeight], ranges: Mapping[str, ActivationRange]
) -> list[str]:
    """Turn a float graph into an integer one, in place, and return the weights that had to be rounded again.

    Every rounded activation a becomes clip(round(a / s) + z, 0, 255) (uint8); weights are int8 with one scale per
    output channel, biases int32 with scale s · s_w. Runtimes merge the pairs with what lies between into integer
    operations. Relu and Clip that rounding implies are left out.

    Args:
        model: the float graph.
        plan: what becomes integer.
        weights: the integers by initializer.
        ranges: by activation.
    """
    ranges = {name: ranges[plan.shared.get(name, name)] for name in plan.points}
    rounded: list[str] = []
    ready: dict[str, tuple[Any, Any]] = {}
    for name in {node.inputs[1].name for node in plan.nodes}:
        codes, scale, exact = seven_bits(weights[name])
        assert np.abs(codes.astype(np.int16)).max() <= SAFE
        ready[name] = codes, scale
        if not exact:
            rounded.append(name)
    for node in plan.nodes:
        _weigh_(model, node, ready, weights[node.inputs[1].name].axis, ranges[node.inputs[0].name])
    for name in set(ready):
        model.graph.initializers.pop(name)
    for name, value in plan.points.items():
        _round_(model, name, value, ranges[name])
    return sorted(rounded)


def _weigh_(model: Any, node: Any, ready: Mapping[str, tuple[Any, Any]], axis: int, inputs: ActivationRange) -> None:
    """Give a node integer weights and, if it is one that takes it, an integer bias."""
    ir = library("onnx_ir")
    name = node.inputs[1].name
    codes, scale = ready[name]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and bias.const_value is not None:
        values = bias.const_value.numpy().astype(np.float64)
        codes, scale = _widened(codes, scale, axis, np.abs(values) / (inputs.scale * MAX_BIAS))
        bias_scale = (np.float32(inputs.scale) * scale).astype(np.float32)
        whole = np.round(values / bias_scale).astype(np.int32)
        result = _dequantize(model, f"{node.outputs[0].name}.bias", (whole, bias_scale, None), 0)
        model.graph.insert_before(node, result.producer())
        node.replace_input_with(2, result)
    result = _dequantize(model, f"{node.outputs[0].name}.weight", (codes, scale, None), axis)
    result.dtype = ir.DataType.FLOAT
    model.graph.insert_before(node, result.producer())
    node.replace_input_with(1, result)


def _widened(codes: Any, scale: Any, axis: int, least: Any) -> tuple[Any, Any]:
    """Return codes and scales where a channel's scale is at least `least`, so that its bias fits 32 bits."""
    wide = np.maximum(scale, least).astype(np.float32)
    shape = [-1 if dim == axis else 1 for dim in range(codes.ndim)]
    return np.round(codes * (scale / wide).reshape(shape)).astype(np.int8), wide


def _dequantize(model: Any, name: str, parts: tuple[Any, Any, Any], axis: int | None) -> Any:
    ir = library("onnx_ir")
    inputs = [
        constant(model.graph, f"{name}.{part}", array)
        for part, array in zip(("codes", "scale", "zero"), parts, strict=True)
        if array is not None
    ]
    return ir.node("DequantizeLinear", inputs, {} if axis is None else {"axis": axis}).outputs[0]


def _round_(model: Any, name: str, value: Any, found: ActivationRange) -> None:
    """Put a value through 8 bits on its way to everything that takes it."""
    ir = library("onnx_ir")
    users = [(use.node, use.idx) for use in value.uses()]
    scale = constant(model.graph, f"{name}.scale", np.array(found.scale, dtype=np.float32))
    zero = constant(model.graph, f"{name}.zero", np.array(found.zero_point, dtype=np.uint8))
    source = _implied(value, found)
    clip = None
    if found.levels < LEVELS:  # the codes of 8 bits reach further than those of training
        bounds = [
            constant(model.graph, f"{name}.{end}", np.array(getattr(found, end), dtype=np.float32))
            for end in ("low", "high")
        ]
        clip = ir.node("Clip", [source, *bounds])
    to_codes = ir.node("QuantizeLinear", [source if clip is None else clip.outputs[0], scale, zero])
    back = ir.node("DequantizeLinear", [to_codes.outputs[0], scale, zero])
    anchor = value.producer()
    assert anchor is not None  # the graph's input is uint8, never a point
    model.graph.insert_after(anchor, [to_codes, back] if clip is None else [clip, to_codes, back])
    for node, index in users:
        node.replace_input_with(index, back.outputs[0])
    if source is not value:
        model.graph.remove(anchor, safe=True)


def _implied(value: Any, found: ActivationRange) -> Any:
    """Return what to round: the input of a Relu or Clip whose bounds the rounding keeps by itself."""
    node = value.producer()
    if node is None or node.op_type not in CLIPS or value.is_graph_output():
        return value
    if activation_function(node.inputs[0]) is not node:
        return value
    low, high = _bounds(node)
    top = (found.levels - found.zero_point) * found.scale
    inside = found.zero_point == 0 and low <= 0 and top <= high * (1 + 1e-6)
    return node.inputs[0] if inside and low == 0 else value


def _bounds(node: Any) -> tuple[float, float]:
    limits = [-np.inf, np.inf]
    if node.op_type == "Relu":
        return 0.0, np.inf
    for index, given in enumerate(node.inputs[1:3]):
        if given is not None:
            limits[index] = float(given.const_value.numpy()) if given.const_value is not None else np.nan
    return limits[0], limits[1]
