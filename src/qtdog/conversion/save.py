"""One file from an attached model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtdog.conversion.attach import Site, refuse_sharded, sites
from qtdog.core.errors import ModelError
from qtdog.core.quantized import QuantizedTensor
from qtdog.packing.packed_file import save_packed
from qtdog.quantizers.base import Quantizer


@dataclass(frozen=True)
class Baked:
    """A model's state under the names of its plain (unattached) form; copies on the CPU.

    A weight that has several names is one object under each of them.

    Attributes:
        quantized: codes and step sizes of the quantized weights.
        rest: every other tensor of the state dict.
    """

    quantized: dict[str, QuantizedTensor]
    rest: dict[str, Tensor]


@torch.no_grad()
def bake(model: nn.Module) -> Baked:
    """Return what `model` has learned, without touching it.

    What has no codes is in `rest`: everything before the quantizers are enabled, and the weights of a member without a
    grid, as they are in evaluation mode.

    Raises:
        ModelError: a quantized weight that is not finite, or a state dict with something that is no tensor.
        ConfigError: the model is sharded (FSDP).
    """
    refuse_sharded(model)
    quantized: dict[str, QuantizedTensor] = {}
    rest: dict[str, Tensor] = {}
    made: dict[int, QuantizedTensor] = {}
    covered: list[str] = []
    renamed: dict[str, str] = {}
    floats: dict[str, Tensor] = {}
    for site in sites(model):
        covered.append(site.prefix)
        if site.quantizer.packs:
            key = id(site.quantizer)
            made[key] = made[key] if key in made else _quantized(site)
            quantized[site.plain_name] = made[key]
        else:
            renamed[f"{site.prefix}original"] = site.plain_name
            floats[f"{site.prefix}original"] = evaluated_weight(site.quantizer, site.weight)
    copies: dict[tuple[object, ...], Tensor] = {}
    for name, value in model.state_dict().items():
        if name in renamed or not name.startswith(tuple(covered)):
            rest[renamed.get(name, name)] = _copied(name, floats.get(name, value), copies)
    return Baked(quantized, rest)


@torch.no_grad()
def evaluated_weight(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """Return the weight that evaluation uses, whatever mode the quantizer is in."""
    was_training = quantizer.training
    quantizer.eval()
    try:
        return quantizer(weight)
    finally:
        quantizer.train(was_training)


def _quantized(site: Site) -> QuantizedTensor:
    if not torch.isfinite(site.weight).all():
        raise ModelError(f"the weight of layer '{site.name}' is not finite, so it has no codes: the training diverged")
    value = site.quantizer.quantized(site.weight)
    return QuantizedTensor(value.codes.cpu(), value.scale.cpu(), value.spec)


def _copied(name: str, value: object, copies: dict[tuple[object, ...], Tensor]) -> Tensor:
    if not isinstance(value, Tensor):
        raise ModelError(f"'{name}' in the model's state dict is no tensor but {type(value).__name__}")
    key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device) if value.numel() else (name,)
    if key not in copies:
        copies[key] = value.detach().to("cpu", copy=True)
    return copies[key]


def save(model: nn.Module, path: Path | str, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write what `model` has learned to one packed file; the model is left as it is.

    Of a wrapper (DistributedDataParallel, torch.compile, AveragedModel, timm's ModelEmaV3) the model inside is saved.

    Raises:
        ModelError: a weight that is not finite.
        ConfigError: the model is sharded (FSDP).
        FormatError: a NaN in the rest of the state dict, or metadata that JSON cannot hold.
        RunError: the disk is full or not writable; the old file is intact.

    Example:
        >>> import tempfile
        >>> from qtdog.conversion.attach import attach
        >>> from qtdog.packing.packed_file import load_packed
        >>> path, model = Path(tempfile.mkdtemp()) / "model.safetensors", nn.Linear(3, 2)
        >>> attach(model, bits=4).enable()
        >>> save(model, path, metadata={"note": "mine"})
        >>> packed = load_packed(path)
        >>> sorted(packed.quantized), sorted(packed.rest), packed.metadata["note"]
        (['weight'], ['bias'], 'mine')
    """
    baked = bake(unwrapped(model))
    save_packed(path, baked.quantized, baked.rest, metadata or {})


WRAPPERS = {"DistributedDataParallel", "DataParallel", "AveragedModel", "OptimizedModule"}
WRAPPERS |= {"ModelEma", "ModelEmaV2", "ModelEmaV3"}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that only train, compile or average it.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> unwrapped(torch.optim.swa_utils.AveragedModel(layer)) is layer, unwrapped(layer) is layer
        (False, True)
    """
    while type(model).__name__ in WRAPPERS:
        inner = getattr(model, "_orig_mod", None) or model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model
