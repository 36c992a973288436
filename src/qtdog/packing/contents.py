"""What the tensors of a packed file may hold: the same checks when it is written and when it is read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qtdog.core.errors import FormatError
from qtdog.core.quantized import QuantizedTensor
from qtdog.packing.header import is_shape

# By the names that safetensors gives them, whose order and sizes are `header.DTYPE_BYTES`.
TORCH_DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16}
TORCH_DTYPES |= {"F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32}
TORCH_DTYPES |= {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def check_scale(path: Path, name: str, scale: Tensor) -> None:
    """Refuse step sizes that are not positive and finite.

    Raises:
        FormatError: naming the file, the weight and the first bad value.
    """
    good = torch.isfinite(scale) & (scale > 0)
    if not good.all():
        found = scale[~good][0].item()
        raise FormatError(f"{path}: the step sizes of '{name}' should be positive and finite, found {found}")


def check_codes(path: Path, name: str, value: QuantizedTensor) -> None:
    """Refuse codes that are not on their grid.

    Raises:
        FormatError: naming the file, the weight, the range and what was found.
    """
    spec = value.spec
    low, high = (int(bound) for bound in value.codes.aminmax())
    if low < spec.qmin or high > spec.qmax:
        raise FormatError(
            f"{path}: the codes of '{name}' should lie in {spec.qmin} … {spec.qmax}, found {low} … {high}"
        )


def check_quantized(path: Path, name: str, value: QuantizedTensor) -> None:
    """Refuse a quantized weight that the format cannot hold.

    Raises:
        FormatError: codes of another type, empty or off their grid; step sizes of another type or number, or bad ones.
    """
    codes, scale, spec = value.codes, value.scale, value.spec
    n_scales = 1 if spec.axis is None else codes.shape[spec.axis]
    if codes.dtype != torch.int8 or not is_shape(list(codes.shape)) or not codes.numel():
        found = f"{codes.dtype} {tuple(codes.shape)}"
        raise FormatError(f"{path}: the codes of '{name}' should be int8 with at least one value, found {found}")
    if scale.dtype != torch.float32 or scale.shape != (n_scales,):
        found = f"{scale.dtype} {tuple(scale.shape)}"
        raise FormatError(f"{path}: the step sizes of '{name}' should be float32 ({n_scales},), found {found}")
    check_codes(path, name, value)
    check_scale(path, name, scale)


def check_rest(path: Path, name: str, value: Tensor) -> None:
    """Refuse a float tensor with NaN, truth values that are neither, or a type that the format does not know.

    Raises:
        FormatError: naming the file and the tensor.
    """
    if value.dtype not in DTYPE_NAMES or not is_shape(list(value.shape)):
        raise FormatError(f"{path}: '{name}' is {value.dtype} {tuple(value.shape)}, which the format cannot hold")
    if value.is_floating_point() and torch.isnan(value).any():
        raise FormatError(f"{path}: '{name}' holds NaN: the training diverged, or the file is damaged")
    if value.dtype == torch.bool and (value.contiguous().view(torch.uint8) > 1).any():
        raise FormatError(f"{path}: '{name}' should hold truth values, found bytes beyond 1: the file is damaged")
