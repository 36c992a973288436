"""From a packed file to an ONNX graph whose weights are the integer codes."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qtdog.core.errors import ModelError
from qtdog.core.progress import Progress
from qtdog.core.quantized import QuantizedTensor
from qtdog.export.inference_module import InferenceModule
from qtdog.export.integer_weight import IntegerWeight, fit
from qtdog.export.packed_source import KEY, ExportInfo, PackedSource, library
from qtdog.training.stop import held_signals


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


def constant(graph: Any, name: str, content: npt.ArrayLike) -> Any:
    """Add an initializer to a graph and return its value.

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


def remove_unused_initializers_(model: Any) -> None:
    """Remove initializers that nothing takes, in the graph and its branches, in place: runtimes warn of each."""
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not list(value.uses()) and not value.is_graph_output():
                graph.initializers.pop(name)


OPSET = 18


def member_graphs(source: PackedSource, module: InferenceModule, progress: Progress = None) -> Iterator[Any]:
    """Yield the float graph (`onnx_ir.Model`) of each member, batch norm folded into the convolutions.

    From normalized images (n, C, H, W), n being free, to logits. Members have one architecture: it is translated once,
    and filled with the weights of each.

    Args:
        source: the packed model.
        module: what `source.module()` gave.
        progress: called with members done and to do.

    Raises:
        ModelError: the onnx extra is not installed, or ONNX has no form of an operator; the text names it.
    """
    library("onnxscript")
    preprocessing = source.infos[0].preprocessing
    example = torch.zeros(2, preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    networks = list(module.members)
    program = _translate_network(networks[0], example, source)
    empty = program.model
    for index, network in enumerate(networks):
        program.model = empty.clone()
        _fill_(program.model, network.state_dict())
        computed = _computed_products(program.model, source.members[index].quantized)
        with quiet():
            program.optimize()
            fold_weights_(program.model, computed)
        yield _with_entry(program.model)
        if progress is not None:
            progress(index + 1, len(networks))


def _translate_network(network: nn.Module, example: torch.Tensor, source: PackedSource) -> Any:
    """Translate a network, without timm's fused attention where that has a position bias or cannot be translated."""
    fused = [module for module in network.modules() if getattr(module, "fused_attn", False)]
    if all(getattr(module, "rel_pos", None) is None for module in fused):  # the fused form has no such bias in ONNX
        try:
            return translate(network, (example,), ["logits"], source)
        except ModelError:
            if not fused:
                raise
    for module in fused:
        module.__dict__["fused_attn"] = False
    try:
        return translate(network, (example,), ["logits"], source)
    finally:
        for module in fused:
            module.__dict__["fused_attn"] = True


def translate(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    outputs: list[str],
    source: PackedSource,
) -> Any:
    """Return a module as an ONNX program that is not optimized.

    Args:
        module: in evaluation mode.
        example: its inputs, for 2 images.
        outputs: their names.
        source: what it is a part of, for errors.

    Raises:
        ModelError: ONNX has no form of an operator; the text names it.
    """
    try:
        with quiet():
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                dynamic_shapes=tuple({0: "n"} for _ in example),
                output_names=outputs,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError) as error:  # the exporter's own errors are RuntimeErrors
        raise ModelError(f"{source.path} cannot be exported to ONNX: {unsupported(error)}") from error
    assert program is not None
    return program


def _fill_(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Replace the weights in a graph, in place."""
    ir = library("onnx_ir")
    for name, value in model.graph.initializers.items():
        if name in state:
            value.const_value = ir.tensor(state[name].detach().contiguous().numpy(), name=name)


LINEAR = ("Conv", "Gemm", "MatMul")
"""Convolutions and matrix products that can compute in integers; their second input is the weight."""
PRODUCTS = (*LINEAR, "ConvTranspose")
"""All operators of that kind."""
COMPUTED = "qtdog_computed_weights"
"""Under this key a graph says which initializers were computed from weights with codes."""
NO_LIMIT = 2**31


def weight_sources(value: Any) -> set[str] | None:
    """Return the names of the initializers that a value is computed from; None if it depends on the images."""
    if value.is_initializer() or (value.producer() is None and value.const_value is not None):
        return {value.name}
    if value.producer() is None:
        return None
    names: set[str] = set()
    for given in value.producer().inputs:
        found = set() if given is None else weight_sources(given)
        if found is None:
            return None
        names |= found
    return names


def _computed_products(model: Any, codes: Mapping[str, QuantizedTensor]) -> set[str]:
    """Return the outputs of the products whose weight the graph computes from weights with codes."""
    products = [node for node in model.graph if node.op_type in LINEAR and not node.inputs[1].is_initializer()]
    return {node.outputs[0].name for node in products if (weight_sources(node.inputs[1]) or set()) & codes.keys()}


def fold_weights_(model: Any, computed: Collection[str]) -> None:
    """Compute weights that the graph would compute for every image, as those of weight-standardized convolutions.

    Standardizing subtracts a mean, so that such a weight lies on no grid of codes any more. The graph keeps which
    initializers are such weights: `model.meta[COMPUTED]`.

    Args:
        model: the float graph; changed in place.
        computed: outputs of the products.
    """
    products = [node for node in model.graph if node.op_type in LINEAR and node.outputs[0].name in computed]
    if not all(node.inputs[1].is_initializer() for node in products):
        optimizer = library("onnxscript.optimizer")
        optimizer.fold_constants(model, input_size_limit=NO_LIMIT, output_size_limit=NO_LIMIT)
        library("onnx_ir").passes.common.LiftConstantsToInitializersPass()(model)
        remove_unused_initializers_(model)
    names = (node.inputs[1].name for node in model.graph if node.outputs[0].name in computed)
    model.meta[COMPUTED] = [name for name in names if name in model.graph.initializers]


def _with_entry(model: Any) -> Any:
    """Let a graph begin with an Identity, so that its input can be rounded like what any node gives."""
    ir = library("onnx_ir")
    (source,) = model.graph.inputs
    entry = ir.node("Identity", [source])
    entry.outputs[0].name, entry.outputs[0].dtype = "entry", source.dtype
    ir.convenience.replace_all_uses_with(source, entry.outputs[0])
    entry.replace_input_with(0, source)
    model.graph.insert_before(model.graph[0], entry)
    return model


def unsupported(error: BaseException) -> str:
    """Return in one line what an exporter stumbled over, the operator first if it is named anywhere in the chain."""
    cause: BaseException | None = error
    lines: list[str] = []
    while cause is not None:
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
        cause = cause.__cause__ or cause.__context__
    named = [line for line in lines if "aten." in line or "Unsupported" in line or "No ONNX function" in line]
    return (named or lines or ["unknown reason"])[0][:400]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and chatter of an exporter off the screen: they speak of its own future, not of the model.

    Ctrl-C acts when the block has ended: an exception inside torch's translation would abort the process.
    """
    logs = [logging.getLogger(name) for name in ("torch.onnx", "torch.utils._pytree")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with held_signals(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def find_codes(model: Any, codes: dict[str, QuantizedTensor]) -> dict[str, IntegerWeight]:
    """Return the integers behind the graph's weights, by initializer.

    A convolution's weight keeps its name; a matrix may have been transposed and renamed, and is found by its values.

    Args:
        model: the float graph.
        codes: by the names of the weights.
    """
    found: dict[str, IntegerWeight] = {}
    renamed = {name: value for name, value in codes.items() if name not in model.graph.initializers}
    by_size: dict[int, list[QuantizedTensor]] = {}
    for value in renamed.values():
        by_size.setdefault(value.codes.numel(), []).append(value)
    for name, weight in model.graph.initializers.items():
        tensor = weight.const_value
        candidates = [codes[name]] if name in codes else by_size.get(tensor.size, [])
        if not candidates or tensor.dtype.name != "FLOAT":
            continue
        content = tensor.numpy()
        fits = (fit(content, value) for value in candidates)
        match = next((one for one in fits if one is not None), None)
        if match is not None:
            found[name] = match
    return found


def store_integers_(model: Any, found: dict[str, IntegerWeight]) -> None:
    """Replace float weights by integer initializers, multiplied by their scale when the file is loaded, in place.

    Written as Cast (or a table for grids that are not uniform) and Mul rather than as DequantizeLinear: runtimes fold
    these constants at load by default, while onnxruntime keeps DequantizeLinear and computes it for every image.
    """
    for name, weight in found.items():
        value = model.graph.initializers.pop(name)
        nodes, result = _float_nodes(model, name, weight)
        replace_(model, value, nodes, result)


def replace_(model: Any, value: Any, nodes: list[Any], result: Any) -> None:
    """Put nodes at the start of a graph and their result wherever `value` was used, in place."""
    ir = library("onnx_ir")
    first = next(iter(model.graph))
    model.graph.insert_before(first, nodes)
    result.shape, result.dtype = value.shape, value.dtype
    ir.convenience.replace_all_uses_with(value, result)


def _float_nodes(model: Any, name: str, weight: IntegerWeight) -> tuple[list[Any], Any]:
    ir = library("onnx_ir")
    scale = constant(model.graph, f"{name}.scale", weight.spread_scale)
    if weight.points is None:
        codes = constant(model.graph, f"{name}.codes", weight.codes)
        unit = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})
    else:
        places = (weight.codes.astype(np.int16) - weight.qmin).astype(np.uint8)
        codes, points = (
            constant(model.graph, f"{name}.codes", places),
            constant(model.graph, f"{name}.points", weight.points),
        )
        index = ir.node("Cast", [codes], {"to": ir.DataType.INT32})
        unit = ir.node("Gather", [points, index.outputs[0]], {"axis": 0})
        product = ir.node("Mul", [unit.outputs[0], scale])
        return [index, unit, product], product.outputs[0]
    product = ir.node("Mul", [unit.outputs[0], scale])
    return [unit, product], product.outputs[0]


MAX_BYTES = 2**31 - 1


def save_onnx(source: PackedSource, graph: Any, path: Path, info: ExportInfo) -> None:
    """Write a graph as one .onnx file with its description in the metadata.

    Raises:
        ModelError: it would be larger than 2 GiB, which the format cannot hold in one file.
    """
    path.write_bytes(to_bytes(source, graph, info))


def _remove_traces_(graph: Any) -> None:
    """Remove what the exporter notes of our source files: paths of this machine, which also change the bytes."""
    for node in graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _remove_traces_(inner)
    for value in graph.value_info:
        value.ClearField("metadata_props")
    graph.ClearField("doc_string")


def to_bytes(source: PackedSource, graph: Any, info: ExportInfo) -> bytes:
    """Return the content of the .onnx file.

    Raises:
        ModelError: as in `save_onnx`.
    """
    ir = library("onnx_ir")
    graph.metadata_props[KEY] = info.model_dump_json()
    graph.producer_name = "qtdog"
    with quiet():
        proto = ir.to_proto(graph)
    _remove_traces_(proto.graph)
    for function in proto.functions:
        _remove_traces_(function)
    if proto.ByteSize() > MAX_BYTES:
        raise ModelError(f"{source.path}: as ONNX it would take {proto.ByteSize()} bytes; one file holds {MAX_BYTES}")
    return proto.SerializeToString()
