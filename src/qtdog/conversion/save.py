"""One file from an attached model, and a plain model from that file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qtdog.conversion.attach import Site, sites
from qtdog.core.errors import ModelError
from qtdog.core.quantized import QuantizedTensor
from qtdog.packing.packed_file import PackedModel, load_packed, save_packed
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
    """
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
            floats[f"{site.prefix}original"] = shipped_weight(site.quantizer, site.weight)
    copies: dict[tuple[object, ...], Tensor] = {}
    for name, value in model.state_dict().items():
        if name in renamed or not name.startswith(tuple(covered)):
            rest[renamed.get(name, name)] = _copied(name, floats.get(name, value), copies)
    return Baked(quantized, rest)


@torch.no_grad()
def shipped_weight(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """Return the weight that evaluation uses, whatever mode the quantizer is in."""
    was_training = quantizer.training
    quantizer.eval()
    try:
        return quantizer(weight)
    finally:
        quantizer.train(was_training)


def plain_state_dict(baked: Baked) -> dict[str, Tensor]:
    """Return a state dict for a freshly built plain model: dequantized weights, and the rest as it is."""
    return {name: value.dequantize() for name, value in baked.quantized.items()} | baked.rest


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


Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, path: Path | str, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write what `model` has learned to one packed file; the model is left as it is.

    Raises:
        ModelError: a weight that is not finite.
        FormatError: a NaN in the rest of the state dict, or metadata that JSON cannot hold.
        RunError: the disk is full or not writable; the old file is intact.
    """
    baked = bake(model)
    save_packed(path, baked.quantized, baked.rest, metadata or {})


def load_into(path: Path | str, model: Model) -> Model:
    """Fill a freshly built plain model from a packed file and return it, in evaluation mode.

    Its weights are the very ones the trained model computed with, so its outputs are the same, bit for bit.

    Raises:
        FormatError: no sound packed model file.
        ModelError: the file's tensors have other names or shapes than the model's; the model is unchanged.

    Example:
        >>> import tempfile, torch
        >>> from qtdog.conversion.attach import attach
        >>> path, model = Path(tempfile.mkdtemp()) / "model.safetensors", nn.Linear(3, 2)
        >>> attach(model, bits=4).enable()
        >>> save(model, path)
        >>> torch.equal(load_into(path, nn.Linear(3, 2)).weight, model.weight)
        True
    """
    return fill(load_packed(path), model, path)


def fill(packed: PackedModel, model: Model, path: Path | str) -> Model:
    """Fill a freshly built plain model with the content of a packed file and return it, in evaluation mode.

    Args:
        packed: the content.
        model: of the kind that was saved, without quantizers.
        path: the file, for errors.

    Raises:
        ModelError: the file's tensors have other names or shapes than the model's; the model is unchanged.
    """
    check_fits(packed, model, path)  # before anything is dequantized: one large weight may have a thousand names
    model.load_state_dict(plain_state_dict(Baked(packed.quantized, packed.rest)))
    return model.eval()


def check_fits(packed: PackedModel, model: nn.Module, path: Path | str) -> None:
    """Compare names and shapes of a packed file with those of a plain model.

    Raises:
        ModelError: they differ; the first few are listed.
    """
    codes = {name: value.codes for name, value in packed.quantized.items()}
    problems = _differences(codes | packed.rest, model.state_dict())
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        text = f"{path} does not fit this {type(model).__name__}: {'; '.join(problems[:5])}{more}"
        raise ModelError(f"{text}. Build the model that was saved, without quantizers attached")


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Any]) -> list[str]:
    problems = [f"'{name}' is missing in the file" for name in expected if name not in found]
    problems += [f"'{name}' is not in the model" for name in found if name not in expected]
    for name in sorted(found.keys() & expected.keys()):
        shapes = tuple(expected[name].shape), tuple(found[name].shape)
        if shapes[0] != shapes[1]:
            problems.append(f"'{name}' should have shape {shapes[0]}, the file has {shapes[1]}")
    return problems
