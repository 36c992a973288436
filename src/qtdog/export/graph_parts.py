"""Putting graphs together from nodes and from other graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qtdog.export.libraries import library


def node(
    graph: Any, kind: str, inputs: Sequence[Any], attributes: Mapping[str, Any] | None = None, *, name: str
) -> Any:
    """Add an operator with one output to the end of a graph, and return that output.

    Args:
        graph: an `onnx_ir.Graph`.
        kind: of the operator.
        inputs: its values.
        attributes: of the operator.
        name: of the output, unique in the whole model.
    """
    made = library("onnx_ir").node(kind, inputs, attributes, name=name)
    made.outputs[0].name = name
    graph.append(made)
    return made.outputs[0]


def array(graph: Any, name: str, content: npt.NDArray[Any]) -> Any:
    """Add an initialiser to a graph, and return its value.

    Args:
        graph: an `onnx_ir.Graph`.
        name: unique in the whole model.
        content: the numbers.
    """
    ir = library("onnx_ir")
    value = ir.Value(name=name, const_value=ir.tensor(np.array(content, order="C"), name=name))
    value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
    graph.register_initializer(value)
    return value


def inline(part: Any, into: Any, given: Sequence[Any], prefix: str) -> list[Any]:
    """Move the nodes of a model to the end of a graph, and return the values of its outputs.

    What is known of shapes in between is dropped: in a branch the number of images is not that of the whole graph.

    Args:
        part: an `onnx_ir.Model`; it is used up.
        into: the `onnx_ir.Graph`.
        given: what to put in the place of the model's inputs.
        prefix: of the names, so that they are unique in the whole model.
    """
    ir = library("onnx_ir")
    outputs = list(part.graph.outputs)
    part.graph.outputs.clear()
    for source, value in zip(list(part.graph.inputs), given, strict=True):
        ir.convenience.replace_all_uses_with(source, value)
    for name in list(part.graph.initializers):
        value = part.graph.initializers.pop(name)
        value.name = f"{prefix}.{name}"
        into.register_initializer(value)
    nodes = list(part.graph)
    part.graph.remove(nodes)
    for index, one in enumerate(nodes):
        one.name = f"{prefix}.{index}"
        for place, value in enumerate(one.outputs):
            value.name = f"{prefix}.{value.name or f'{index}.{place}'}"
            value.shape = None
    into.extend(nodes)
    return outputs
