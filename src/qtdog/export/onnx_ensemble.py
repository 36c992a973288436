"""One ONNX graph from the graphs of an ensemble's members: all are asked, or one after another in a cascade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qtdog.export.inference_module import INPUT, InferenceModule, Settled
from qtdog.export.onnx_graph import OPSET, constant, inline, node, quiet, remove_unused_initializers_, translate
from qtdog.export.packed_source import PackedSource, library


@dataclass(frozen=True)
class Cascade:
    """What `InferenceModule` does with a threshold, in ONNX operators.

    Behind each member but the last is an `If`: where every image is settled nothing further is run; otherwise the
    others are gathered, given to the next member, and their logits are put beside those of the settled ones. So an
    image gets the same answer whatever images come with it.

    Attributes:
        members: their graphs (`onnx_ir.Model`); they are used up.
        settled: the graph of `Settled`, for any number of members and images.
    """

    members: Sequence[Any]
    settled: Any

    def level(self, index: int, graph: Any, inputs: Any, before: Any) -> tuple[Any, Any]:
        """Ask member `index` and those behind it.

        Args:
            index: of the member.
            graph: the `onnx_ir.Graph` that its nodes are put into.
            inputs: normalised images (n, C, H, W).
            before: logits of the members that were asked already, (n, index, n_classes); None for the first.

        Returns:
            Logits (n, members, n_classes), zero where a member was not asked, and how many were, int64 (n,).
        """
        (logits,) = inline(self.members[index], graph, [inputs], f"members.{index}")
        part = _Part(graph, f"level.{index}")
        each = part.node("Unsqueeze", [logits, part.array([1])])
        if before is not None:
            each = part.node("Concat", [before, each], axis=1)
        if index == len(self.members) - 1:
            return each, self._asked(part, each, index)
        (settled,) = inline(self.settled.clone(), graph, [each], f"settled.{index}")
        whole = part.node("ReduceMin", [part.cast(settled, "INT32")], keepdims=0)
        stop, go = self._stop(index, each), self._go(index, (inputs, each, settled))
        branch = library("onnx_ir").node(
            "If",
            [part.cast(whole, "BOOL")],
            {"then_branch": stop, "else_branch": go},
            num_outputs=2,
            name=f"level.{index}",
        )
        for name, value in zip(("logits", "members"), branch.outputs, strict=True):
            value.name = f"level.{index}.{name}"
        graph.append(branch)
        return branch.outputs[0], branch.outputs[1]

    def _stop(self, index: int, each: Any) -> Any:
        """Make the branch in which every image is settled."""
        graph = _branch(f"stop.{index}")
        part = _Part(graph, f"stop.{index}")
        return _ending(graph, [self._padded(part, each, index), self._asked(part, each, index)])

    def _go(self, index: int, known: tuple[Any, Any, Any]) -> Any:
        """Make the branch in which the images that are left go to the next member."""
        inputs, each, settled = known
        graph = _branch(f"go.{index}")
        part = _Part(graph, f"go.{index}")
        rows = part.node("Transpose", [part.node("NonZero", [part.node("Not", [settled])])], perm=[1, 0])
        left = part.node("Reshape", [rows, part.array([-1])])
        chosen = [part.node("Gather", [value, left], axis=0) for value in (inputs, each)]
        deeper = self.level(index + 1, graph, *chosen)
        mine = self._padded(part, each, index), self._asked(part, each, index)
        both = [part.node("ScatterND", [own, rows, deep]) for own, deep in zip(mine, deeper, strict=True)]
        return _ending(graph, both)

    def _padded(self, part: _Part, each: Any, index: int) -> Any:
        """Make room for the members that were not asked."""
        n_missing = len(self.members) - index - 1
        return part.node("Pad", [each, part.array([0, 0, 0, 0, n_missing, 0])], mode="constant")

    def _asked(self, part: _Part, each: Any, index: int) -> Any:
        """Say of every image that index + 1 members were asked."""
        n = part.node("Shape", [each], start=0, end=1)
        return part.node("Expand", [part.array(np.array([index + 1])), n])


class _Part:
    """Adds nodes with unique names to a graph."""

    def __init__(self, graph: Any, prefix: str) -> None:
        self.graph, self.prefix, self.count = graph, prefix, 0

    def name(self) -> str:
        self.count += 1
        return f"{self.prefix}.{self.count}"

    def node(self, kind: str, inputs: Sequence[Any], **attributes: Any) -> Any:
        return node(self.graph, kind, inputs, attributes, name=self.name())

    def cast(self, value: Any, dtype: str) -> Any:
        return self.node("Cast", [value], to=library("onnx_ir").DataType[dtype])

    def array(self, content: Any) -> Any:
        return constant(self.graph, self.name(), np.asarray(content))


def _branch(name: str) -> Any:
    return library("onnx_ir").Graph([], [], nodes=[], name=name)


def _ending(graph: Any, outputs: Sequence[Any]) -> Any:
    graph.outputs.extend(outputs)
    return graph


IR_VERSION = 8  # the lowest that knows opset 18, so that onnxruntime of 2023 (1.16) reads the file


def join(source: PackedSource, module: InferenceModule, members: Sequence[Any]) -> Any:
    """Return one graph (`onnx_ir.Model`) from uint8 images (n, H, W, C) to the outputs of `PackedSource.outputs`.

    Args:
        source: the packed model.
        module: what `source.module()` gave.
        members: their graphs, from normalised images to logits; they are used up.

    Raises:
        ModelError: the onnx extra is not installed.
    """
    ir = library("onnx_ir")
    preprocessing = source.infos[0].preprocessing
    size = (preprocessing.image_size, preprocessing.image_size, preprocessing.channels)
    images = ir.Value(name=INPUT, shape=ir.Shape(["n", *size]), type=ir.TensorType(ir.DataType.UINT8))
    top = ir.Graph([images], [], nodes=[], opset_imports={"": OPSET}, name="qtdog")
    pixels = torch.zeros(2, *size, dtype=torch.uint8)
    (inputs,) = inline(_optimized(module.prepare, (pixels,), 1, source), top, [images], "prepare")
    asked: list[Any] = []
    if source.threshold is None:
        logits = _all(members, top, inputs)
    else:
        rule, n_classes = Settled(source.temperature, source.threshold), len(source.infos[0].classes)
        free = {0: "n", 1: "members"}
        settled = _optimized(rule, (torch.zeros(2, 2, n_classes),), 1, source, free=free)
        logits, *asked = Cascade(members, settled).level(0, top, inputs, None)
        for count in asked:
            count.type = ir.TensorType(ir.DataType.INT64)
    example = [torch.zeros(2, len(members), len(source.infos[0].classes))]
    example += [torch.ones(2, dtype=torch.int64)] * len(asked)
    n_answers = len(source.outputs) - len(asked)
    found = inline(_optimized(module.answer, tuple(example), n_answers, source), top, [logits, *asked], "answer")
    for name, value in zip(source.outputs, [*found, *asked], strict=True):
        value.name = name
        value.shape = ir.Shape(["n", len(source.infos[0].classes)] if name in ("logits", "probabilities") else ["n"])
        top.outputs.append(value)
    model = ir.Model(top, ir_version=IR_VERSION)
    remove_unused_initializers_(model)
    return model


def _all(members: Sequence[Any], top: Any, inputs: Any) -> Any:
    """Ask every member, and return logits (n, members, n_classes)."""
    axis = constant(top, "axis", np.array([1]))
    each = []
    for index, member in enumerate(members):
        (logits,) = inline(member, top, [inputs], f"members.{index}")
        each.append(node(top, "Unsqueeze", [logits, axis], name=f"each.{index}"))
    return each[0] if len(each) == 1 else node(top, "Concat", each, {"axis": 1}, name="each")


MAX_GRAPHS = 32
_GRAPHS: dict[tuple[Any, ...], Any] = {}


def _optimized(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    n_outputs: int,
    source: PackedSource,
    *,
    free: Mapping[int, str] | None = None,
) -> Any:
    """Return the graph of a part without weights. A part with the same numbers is translated once in a process."""
    numbers = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
    buffers = [(name, value.numpy().tobytes()) for name, value in module.named_buffers()]
    inputs = [(tuple(one.shape), one.dtype) for one in example]
    key = (type(module), *numbers, *buffers, *inputs, n_outputs, *(free or {}).items())
    if key not in _GRAPHS:
        program = translate(module, example, [f"output_{index}" for index in range(n_outputs)], source, free=free)
        with quiet():
            program.optimize()
        if len(_GRAPHS) >= MAX_GRAPHS:
            _GRAPHS.clear()
        _GRAPHS[key] = program.model
    return _GRAPHS[key].clone()
