"""One ONNX graph from the graphs of the members: preprocessing before, answers and doubt behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qtdog.export.cascade_graph import Cascade
from qtdog.export.deployed import INPUT, Deployed
from qtdog.export.graph_parts import array, inline, node
from qtdog.export.libraries import library
from qtdog.export.onnx_graph import OPSET, quiet, translate
from qtdog.export.subject import Subject

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
