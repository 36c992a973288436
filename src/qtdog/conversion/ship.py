"""One file from an attached model, and a plain model from that file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from qtdog.conversion.bake import Baked, bake, plain_state_dict
from qtdog.core.errors import ModelError
from qtdog.packing.packed_file import PackedModel, load_packed, save_packed

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
    # compared before anything is dequantized: a hostile file may give one large weight a thousand names
    codes = {name: value.codes for name, value in packed.quantized.items()}
    problems = _differences(codes | packed.rest, model.state_dict())
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        text = f"{path} does not fit this {type(model).__name__}: {'; '.join(problems[:5])}{more}"
        raise ModelError(f"{text}. Build the model that was saved, without quantizers attached")
    model.load_state_dict(plain_state_dict(Baked(packed.quantized, packed.rest)))
    return model.eval()


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Any]) -> list[str]:
    problems = [f"'{name}' is missing in the file" for name in expected if name not in found]
    problems += [f"'{name}' is not in the model" for name in found if name not in expected]
    for name in sorted(found.keys() & expected.keys()):
        shapes = tuple(expected[name].shape), tuple(found[name].shape)
        if shapes[0] != shapes[1]:
            problems.append(f"'{name}' should have shape {shapes[0]}, the file has {shapes[1]}")
    return problems
