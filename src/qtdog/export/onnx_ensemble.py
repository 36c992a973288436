"""One ONNX graph from the graphs of an ensemble's members: all are asked, or one after another in a cascade."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qtdog.export.inference_module import INPUT, Deployed
from qtdog.export.info import library
from qtdog.export.onnx_graph import OPSET, array, inline, node, quiet, translate
from qtdog.export.source import Subject


@dataclass(frozen=True)
class Cascade:
    """What `Deployed` does with a threshold, in ONNX operators.

    Behind each member but the last is an `If`: where every image is settled nothing further is run; otherwise the
    others are gathered, given to the next member, and their logits are put beside those of the settled ones. So an
    image gets the same answer whatever images come with it.

    Attributes:
        members: their graphs (`onnx_ir.Model`); they are used up.
        temperature: T.
        threshold: of `answer.settled`.
    """

    members: Sequence[Any]
    temperature: float
    threshold: float

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
        settled = self._settled(part, each)
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

    def _settled(self, part: _Part, each: Any) -> Any:
        """Say which images need no further member, (n,)."""
        mean = part.node("ReduceMean", [each, part.array([1])], keepdims=0)
        scaled = part.node("Div", [mean, part.array(np.float32(self.temperature))])
        top = part.node("ReduceMax", [part.node("Softmax", [scaled], axis=1), part.array([1])], keepdims=0)
        sure = part.node("GreaterOrEqual", [top, part.array(np.float32(self.threshold))])
        # if all choose alike, then so does their mean
        choices = part.node("ArgMax", [each], axis=2, keepdims=0)
        same = part.node("Equal", [choices, part.node("ArgMax", [mean], axis=1, keepdims=1)])
        alike = part.node("ReduceMin", [part.cast(same, "INT32"), part.array([1])], keepdims=0)
        return part.node("And", [sure, part.cast(alike, "BOOL")])

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
        return array(self.graph, self.name(), np.asarray(content))


def _branch(name: str) -> Any:
    return library("onnx_ir").Graph([], [], nodes=[], name=name)


def _ending(graph: Any, outputs: Sequence[Any]) -> Any:
    graph.outputs.extend(outputs)
    return graph


IR_VERSION = 10


def join(subject: Subject, module: Deployed, members: Sequence[Any]) -> Any:
    """Return one graph (`onnx_ir.Model`) from uint8 images (n, H, W, C) to the outputs of `Subject.outputs`.

    Args:
        subject: the packed model.
        module: what `subject.module()` gave.
        members: their graphs, from normalised images to logits; they are used up.

    Raises:
        ModelError: the onnx extra is not installed.
    """
    ir = library("onnx_ir")
    how = subject.infos[0].preprocessing
    size = (how.image_size, how.image_size, how.channels)
    images = ir.Value(name=INPUT, shape=ir.Shape(["n", *size]), type=ir.TensorType(ir.DataType.UINT8))
    top = ir.Graph([images], [], nodes=[], opset_imports={"": OPSET}, name="qtdog")
    pixels = torch.zeros(2, *size, dtype=torch.uint8)
    (inputs,) = inline(_optimised(module.prepare, (pixels,), 1, subject), top, [images], "prepare")
    asked: list[Any] = []
    if subject.threshold is None:
        logits = _all(members, top, inputs)
    else:
        cascade = Cascade(members, subject.temperature, subject.threshold)
        logits, *asked = cascade.level(0, top, inputs, None)
        for count in asked:
            count.type = ir.TensorType(ir.DataType.INT64)
    example = [torch.zeros(2, len(members), len(subject.infos[0].classes))]
    example += [torch.ones(2, dtype=torch.int64)] * len(asked)
    n_answers = len(subject.outputs) - len(asked)
    found = inline(_optimised(module.answer, tuple(example), n_answers, subject), top, [logits, *asked], "answer")
    for name, value in zip(subject.outputs, [*found, *asked], strict=True):
        value.name = name
        value.shape = ir.Shape(["n", len(subject.infos[0].classes)] if name in ("logits", "probabilities") else ["n"])
        top.outputs.append(value)
    return ir.Model(top, ir_version=IR_VERSION)


def _all(members: Sequence[Any], top: Any, inputs: Any) -> Any:
    """Ask every member, and return logits (n, members, n_classes)."""
    axis = array(top, "axis", np.array([1]))
    each = []
    for index, member in enumerate(members):
        (logits,) = inline(member, top, [inputs], f"members.{index}")
        each.append(node(top, "Unsqueeze", [logits, axis], name=f"each.{index}"))
    return each[0] if len(each) == 1 else node(top, "Concat", each, {"axis": 1}, name="each")


def _optimised(module: torch.nn.Module, example: tuple[torch.Tensor, ...], n_outputs: int, subject: Subject) -> Any:
    program = translate(module, example, [f"output_{index}" for index in range(n_outputs)], subject)
    with quiet():
        program.optimize()
    return program.model
