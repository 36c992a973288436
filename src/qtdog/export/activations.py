"""Which tensors of a graph become 8-bit integers, and what follows from that."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

CLIPS = ("Relu", "Clip")
LINEAR = ("Conv", "Gemm", "MatMul")


@dataclass
class Plan:
    """What is computed in integers.

    Attributes:
        nodes: convolutions and matrix products with integer weights.
        points: the activations that are rounded, by name, in the order of the graph.
        shared: output of a pooling to its input: the two have one range, so that pooling works on the codes.
    """

    nodes: list[Any] = field(default_factory=list)
    points: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    def add(self, value: Any) -> None:
        """Round a value."""
        self.points.setdefault(value.name, value)


def make_plan(model: Any, weights: Collection[str]) -> Plan:
    """Return which nodes and activations of a float graph become integers.

    Rounded are the input of every product with an integer weight, and behind every convolution what its activation
    function leaves, so that convolution and rounding become one operation; further both sides and the sum where a
    convolution's output is added to something (residual connections), and max pooling. Everything else stays float:
    what has no integer weights, the outputs of matrix products (logits, attention), normalisations, softmax.

    Args:
        model: the float graph (`onnx_ir.Model`).
        weights: names of the initialisers with integer codes.
    """
    plan, ends = Plan(), set[str]()
    for node in model.graph:
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


def _end(node: Any, plan: Plan) -> Any:
    """Round what a node's activation function leaves, and return it."""
    clip = activation_function(node.outputs[0])
    value = node.outputs[0] if clip is None else clip.outputs[0]
    plan.add(value)
    return value


def _joins(node: Any, ends: Collection[str]) -> bool:
    constant = any(value.const_value is not None for value in node.inputs)
    return not constant and any(value.name in ends for value in node.inputs)
