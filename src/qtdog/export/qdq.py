"""Integer activations: QuantizeLinear and DequantizeLinear around everything that a plan names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qtdog.export.activations import CLIPS, Plan, activation_function
from qtdog.export.integer_weight import SAFE, IntegerWeight, seven_bits
from qtdog.export.libraries import library
from qtdog.export.onnx_graph import constant
from qtdog.export.ranges import LEVELS, Range

MAX_BIAS = 2**30  # leaves room in the 32-bit sum for the products


def quantize_(model: Any, plan: Plan, weights: Mapping[str, IntegerWeight], ranges: Mapping[str, Range]) -> list[str]:
    """Turn a float graph into an integer one, in place, and return the weights that had to be rounded again.

    Every rounded activation a becomes clip(round(a / s) + z, 0, 255) (uint8); weights are int8 with one scale per
    output channel, biases int32 with scale s · s_w. Runtimes merge the pairs with what lies between into integer
    operations. Relu and Clip that rounding implies are left out.

    Args:
        model: the float graph.
        plan: what becomes integer.
        weights: the integers by initialiser.
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


def _weigh_(model: Any, node: Any, ready: Mapping[str, tuple[Any, Any]], axis: int, inputs: Range) -> None:
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
        constant(model, f"{name}.{part}", array)
        for part, array in zip(("codes", "scale", "zero"), parts, strict=True)
        if array is not None
    ]
    return ir.node("DequantizeLinear", inputs, {} if axis is None else {"axis": axis}).outputs[0]


def _round_(model: Any, name: str, value: Any, found: Range) -> None:
    """Put a value through 8 bits on its way to everything that takes it."""
    ir = library("onnx_ir")
    users = [(use.node, use.idx) for use in value.uses()]
    scale = constant(model, f"{name}.scale", np.array(found.scale, dtype=np.float32))
    zero = constant(model, f"{name}.zero", np.array(found.zero_point, dtype=np.uint8))
    source = _implied(value, found)
    to_codes = ir.node("QuantizeLinear", [source, scale, zero])
    back = ir.node("DequantizeLinear", [to_codes.outputs[0], scale, zero])
    anchor = value.producer()
    assert anchor is not None  # the graph's input is uint8, never a point
    model.graph.insert_after(anchor, [to_codes, back])
    for node, index in users:
        node.replace_input_with(index, back.outputs[0])
    if source is not value:
        model.graph.remove(anchor, safe=True)


def _implied(value: Any, found: Range) -> Any:
    """Return what to round: the input of a Relu or Clip whose bounds the rounding keeps by itself."""
    node = value.producer()
    if node is None or node.op_type not in CLIPS or value.is_graph_output():
        return value
    if activation_function(node.inputs[0]) is not node:
        return value
    low, high = _bounds(node)
    top = (LEVELS - found.zero_point) * found.scale
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
