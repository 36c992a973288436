"""A C header with the codes, step sizes and shapes of a model, and a reader that makes the model of it again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtdog.core.errors import FormatError, ModelError
from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.export.inference_module import InferenceModule
from qtdog.export.packed_source import ExportInfo, PackedSource, parse_info
from qtdog.models.network import to_device_
from qtdog.packing.packed_file import PackedModel
from qtdog.training.load_model import build_networks, read_info

PER_LINE = 16
MAX_DIMS = 6
HEAD = """/* A model of qtdog as data: codes, step sizes and shapes of its quantized weights, and all other tensors.
 *
 * A weight is points[code - qmin] * scale, or code * scale where points is NULL. With axis -1 there is one scale;
 * else the index along that axis says which, and with several groups of dimension 0 it is scale number
 * group * dims[axis] + index. Arrays are in C order. Input: pixels of image_size x image_size,
 * (pixel / 255 - mean) / std for each channel; the probabilities are softmax(logits / temperature). qtdog_about is the
 * description as JSON.
 */
#ifndef QTDOG_MODEL_H
#define QTDOG_MODEL_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *name, *levels;
    int bits, qmin, axis, groups, ndim;
    int32_t dims[6];
    const int8_t *codes;
    int32_t n_scales;
    const float *scale, *points;
} qtdog_weight;

typedef struct {
    const char *name, *dtype;
    int ndim;
    int32_t dims[6];
    const float *floats;
    const int64_t *integers;
} qtdog_tensor;
"""
TYPES = {"int8_t": np.int8, "float": np.float32, "int64_t": np.int64}


def save_header(source: PackedSource, _: Any, path: Path, info: ExportInfo) -> None:
    """Write a packed model as a C header.

    Raises:
        FormatError: a tensor that no array of the header can hold (complex numbers, more than 6 dimensions).
        ModelError: the model rounds activations, of whose grids the header has no array.
    """
    first = source.infos[0]
    if any(info.activations for info in source.infos):
        raise ModelError(
            f"{source.path} was trained with rounded activations, and a C header holds no grids for them: a program "
            "made from it would answer otherwise. Use --format onnx-int8 or openvino-int8, which have them"
        )
    arrays: list[str] = []
    made: dict[int, str] = {}
    weights, tensors = [], []
    for index, member in enumerate(source.members):
        for name, value in member.quantized.items():
            weights.append(_weight(f"members.{index}.{name}", value, arrays, made))
        for name, tensor in member.rest.items():
            tensors.append(_tensor(f"members.{index}.{name}", tensor, arrays, made))
    about = json.dumps(info.model_dump(mode="json") | {"model": source.members[0].metadata})
    how = first.preprocessing
    lines = [
        HEAD,
        f"#define QTDOG_N_MEMBERS {len(source.members)}",
        f"#define QTDOG_N_CLASSES {len(first.classes)}",
        f"#define QTDOG_IMAGE_SIZE {how.image_size}",
        f"#define QTDOG_CHANNELS {how.channels}",
        f"#define QTDOG_TEMPERATURE {source.temperature!r}",
        f"#define QTDOG_ACCEPT_THRESHOLD {source.accept_threshold or 0.0!r}",
        f"static const char *const qtdog_classes[] = {{{', '.join(map(_text, first.classes))}}};",
        _array("float", "qtdog_mean", np.array(how.mean)),
        _array("float", "qtdog_std", np.array(how.std)),
        *arrays,
        _table("qtdog_weight", "qtdog_weights", weights),
        _table("qtdog_tensor", "qtdog_tensors", tensors),
        f"static const char qtdog_about[] =\n    {_long_text(about)};",
        "#endif\n",
    ]
    path.write_text("\n".join(lines), encoding="ascii")


def _weight(name: str, value: QuantizedTensor, arrays: list[str], made: dict[int, str]) -> str:
    spec, codes = value.spec, value.codes.contiguous()
    if id(value) not in made:
        number = str(len(made))
        made[id(value)] = number
        arrays.append(_array("int8_t", f"qtdog_codes_{number}", codes.numpy().reshape(-1)))
        arrays.append(_array("float", f"qtdog_scale_{number}", value.scale.numpy()))
        if spec.levels not in ("uniform", "symmetric"):
            arrays.append(_array("float", f"qtdog_points_{number}", spec.points().numpy()))
    number = made[id(value)]
    points = "NULL" if spec.levels in ("uniform", "symmetric") else f"qtdog_points_{number}"
    axis = -1 if spec.axis is None else spec.axis
    numbers = f"{spec.bits}, {spec.qmin}, {axis}, {spec.groups}, {_dims(name, codes.shape)}"
    data = f"qtdog_codes_{number}, {value.scale.numel()}, qtdog_scale_{number}, {points}"
    return f"{{{_text(name)}, {_text(spec.levels)}, {numbers}, {data}}}"


def _tensor(name: str, tensor: Tensor, arrays: list[str], made: dict[int, str]) -> str:
    if tensor.is_complex() or tensor.dtype == torch.float64:
        raise FormatError(f"'{name}' is {tensor.dtype}, which the arrays of a C header do not hold")
    kind = "float" if tensor.is_floating_point() else "int64_t"
    if id(tensor) not in made:
        made[id(tensor)] = str(len(made))
        values = tensor.contiguous().to(torch.float32 if kind == "float" else torch.int64).numpy().reshape(-1)
        arrays.append(_array(kind, f"qtdog_values_{made[id(tensor)]}", values))
    array = f"qtdog_values_{made[id(tensor)]}"
    data = f"{array}, NULL" if kind == "float" else f"NULL, {array}"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{{{_text(name)}, {_text(dtype)}, {_dims(name, tensor.shape)}, {data}}}"


def _dims(name: str, shape: torch.Size) -> str:
    if len(shape) > MAX_DIMS:
        raise FormatError(f"'{name}' has {len(shape)} dimensions, a C header holds {MAX_DIMS}")
    return f"{len(shape)}, {{{', '.join(map(str, shape)) or 0}}}"


def _array(kind: str, name: str, values: npt.NDArray[Any]) -> str:
    """Return the definition of an array; floats are hexadecimal, and so exact."""
    written = [_number(value) for value in values.astype(np.float32).tolist()] if kind == "float" else values.tolist()
    texts = [str(value) for value in written] or ["0"]  # C has no empty array
    lines = [", ".join(texts[start : start + PER_LINE]) for start in range(0, len(texts), PER_LINE)]
    body = ",\n".join(lines)
    return f"static const {kind} {name}[{len(texts)}] = {{\n{body}}};"


def _number(value: float) -> str:
    if math.isfinite(value):
        return value.hex()
    return "NAN" if math.isnan(value) else ("INFINITY" if value > 0 else "-INFINITY")


def _text(text: str) -> str:
    """Return a text as a C string of ASCII letters, its bytes UTF-8."""
    parts = [
        chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}" for byte in text.encode("utf-8")
    ]
    return f'"{"".join(parts)}"'


def _long_text(text: str) -> str:
    return "\n    ".join(_text(text[start : start + 80]) for start in range(0, len(text), 80))


def _table(kind: str, name: str, rows: list[str]) -> str:
    body = ",\n    ".join(rows) or "{0}"
    return f"#define {name.upper()}_N {len(rows)}\nstatic const {kind} {name}[] = {{\n    {body}}};"


ARRAY = re.compile(r"static const (int8_t|float|int64_t) (qtdog_\w+)\[(\d+)\] = \{([^}]*)\};")
STRING = r'"((?:[^"\\]|\\[0-7]{3})*)"'
DIMS = r"(\d+), \{([\d, ]*)\}"
WEIGHT = re.compile(
    rf"\{{{STRING}, {STRING}, (\d+), (-?\d+), (-?\d+), (\d+), {DIMS}, (\w+), (\d+), (\w+), (\w+)\}}", re.MULTILINE
)
TENSOR = re.compile(rf"\{{{STRING}, {STRING}, {DIMS}, (\w+), (\w+)\}}")
ABOUT = re.compile(rf"static const char qtdog_about\[\] =((?:\s*{STRING})+);")


def open_header(path: Path, threads: int) -> tuple[ExportInfo, Callable[[Any], list[Any]], Any]:
    """Return description, function and module of the model in a C header, rebuilt from its arrays alone.

    Args:
        path: a header of `save_header`.
        threads: that it may use, a setting of the whole process.

    Raises:
        FormatError: damaged, or not made by qtdog.
        ModelError: its backbone is not known here, or does not fit.
    """
    try:
        text = path.read_text(encoding="ascii")
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{path} cannot be read as a C header: {error}") from error
    about = ABOUT.search(text)
    described = None if about is None else "".join(_plain(part) for part in re.findall(STRING, about[1]))
    info = parse_info(path, described)
    try:
        members = _members(text, info.n_members, json.loads(described or "")["model"])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    networks = build_networks(path, members, read_info(path, members[0].metadata))
    networks = [to_device_(network, torch.device("cpu")) for network in networks]
    torch.set_num_threads(threads)
    module = InferenceModule(networks, info.preprocessing, info.temperature, accept_threshold=info.accept_threshold)

    @torch.inference_mode()
    def run(images: Any) -> list[Any]:
        return [output.numpy() for output in module(torch.from_numpy(images))]

    return info, run, module


def _members(text: str, n_members: int, metadata: Mapping[str, Any]) -> list[PackedModel]:
    arrays = {found[2]: _values(found[1], found[4], int(found[3])) for found in ARRAY.finditer(text)}
    members = [PackedModel({}, {}, dict(metadata)) for _ in range(n_members)]
    made: dict[str, QuantizedTensor | Tensor] = {}
    for found in WEIGHT.finditer(text):
        name, levels, bits, _, axis, groups, _, dims, codes, _, scale, _ = found.groups()
        spec = QuantSpec(int(bits), None if axis == "-1" else int(axis), levels, int(groups))
        if codes not in made:
            shaped = torch.from_numpy(arrays[codes]).reshape(_shape(dims))
            made[codes] = QuantizedTensor(shaped, torch.from_numpy(arrays[scale]), spec)
        index, plain = _member_of(_plain(name))
        value = made[codes]
        assert isinstance(value, QuantizedTensor)
        members[index].quantized[plain] = value
    for found in TENSOR.finditer(text):
        name, dtype, n_dims, dims, floats, integers = found.groups()
        array = integers if floats == "NULL" else floats
        if array not in made:
            shape = _shape(dims) if int(n_dims) else ()
            size = math.prod(shape)
            made[array] = torch.from_numpy(arrays[array][:size]).reshape(shape).to(getattr(torch, dtype))
        index, plain = _member_of(_plain(name))
        tensor = made[array]
        assert isinstance(tensor, Tensor)
        members[index].rest[plain] = tensor
    return members


def _values(kind: str, body: str, n: int) -> npt.NDArray[Any]:
    parts: Iterable[str] = (part.strip() for part in body.split(","))
    special = {"NAN": math.nan, "INFINITY": math.inf, "-INFINITY": -math.inf}
    read = (lambda part: special[part] if part in special else float.fromhex(part)) if kind == "float" else int
    values = np.array([read(part) for part in parts], dtype=TYPES[kind])
    if len(values) != n:
        raise ValueError(f"an array of {n} values has {len(values)}")
    return values


def _shape(dims: str) -> tuple[int, ...]:
    return tuple(int(part) for part in dims.split(","))


def _member_of(name: str) -> tuple[int, str]:
    _, index, plain = name.split(".", 2)
    return int(index), plain


def _plain(text: str) -> str:
    parts = re.split(r"\\([0-7]{3})", text)
    content = b"".join(bytes([int(part, 8)]) if place % 2 else part.encode() for place, part in enumerate(parts))
    return content.decode("utf-8")
