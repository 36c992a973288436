"""One ONNX graph from the graphs of an ensemble's members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qtdog.export.inference_module import INPUT, InferenceModule
from qtdog.export.onnx_graph import OPSET, constant, inline, node, quiet, remove_unused_initializers_, translate
from qtdog.export.packed_source import PackedSource, library

IR_VERSION = 8  # the lowest that knows opset 18, so that onnxruntime of 2023 (1.16) reads the file


def join(source: PackedSource, module: InferenceModule, members: Sequence[Any]) -> Any:
    """Return one graph (`onnx_ir.Model`) from uint8 images (n, H, W, C) to the outputs of `PackedSource.outputs`.

    Args:
        source: the packed model.
        module: what `source.module()` gave.
        members: their graphs, from normalized images to logits; they are used up.

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
    logits = _all(members, top, inputs)
    example = torch.zeros(2, len(members), len(source.infos[0].classes))
    found = inline(_optimized(module.answer, (example,), len(source.outputs), source), top, [logits], "answer")
    for name, value in zip(source.outputs, found, strict=True):
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


def _optimized(module: torch.nn.Module, example: tuple[torch.Tensor, ...], n_outputs: int, source: PackedSource) -> Any:
    """Return the graph of a part without weights. A part with the same numbers is translated once in a process."""
    numbers = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
    buffers = [(name, value.numpy().tobytes()) for name, value in module.named_buffers()]
    inputs = [(tuple(one.shape), one.dtype) for one in example]
    key = (type(module), *numbers, *buffers, *inputs, n_outputs)
    if key not in _GRAPHS:
        program = translate(module, example, [f"output_{index}" for index in range(n_outputs)], source)
        with quiet():
            program.optimize()
        if len(_GRAPHS) >= MAX_GRAPHS:
            _GRAPHS.clear()
        _GRAPHS[key] = program.model
    return _GRAPHS[key].clone()
