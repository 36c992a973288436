"""A plain model from a packed file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from qtdog.core.errors import ModelError
from qtdog.core.quantized import QuantizedTensor
from qtdog.packing.packed_file import PackedModel, load_packed

Model = TypeVar("Model", bound=nn.Module)


def load_into(path: Path | str, model: Model) -> Model:
    """Load a packed file into a freshly built plain model and return it, in evaluation mode.

    Its weights are the very ones the trained model computed with, so its outputs are the same, bit for bit. Prefixes of
    wrappers in the file's names (`module.`, `_orig_mod.`) are left out where the model has none.

    Raises:
        FormatError: no sound packed model file.
        ModelError: the file's tensors have other names or shapes than the model's; the model is unchanged.

    Example:
        >>> import tempfile, torch
        >>> from qtdog.conversion.attach import attach
        >>> from qtdog.conversion.save import save
        >>> path, model = Path(tempfile.mkdtemp()) / "model.safetensors", nn.Linear(3, 2)
        >>> attach(model, bits=4).enable()
        >>> save(model, path)
        >>> torch.equal(load_into(path, nn.Linear(3, 2)).weight, model.weight)
        True
    """
    return load_content(load_packed(path), model, path)


def load_content(packed: PackedModel, model: Model, path: Path | str) -> Model:
    """Load the content of a packed file into a freshly built plain model and return it, in evaluation mode.

    Args:
        packed: the content.
        model: of the kind that was saved, without quantizers.
        path: the file, for errors.

    Raises:
        ModelError: the file's tensors have other names or shapes than the model's; the model is unchanged.
    """
    load_state_(packed, model, path)
    return model.eval()


def load_state_(packed: PackedModel, model: nn.Module, path: Path | str) -> None:
    """Do as `load_content` does, leaving the mode of the model as it is."""
    packed = without_wrapper(packed, model)
    check_fits(packed, model, path)  # before anything is dequantized: one large weight may have a thousand names
    model.load_state_dict(plain_state_dict(packed))


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
        names = [*codes, *packed.rest, *model.state_dict()]
        prefixes = sorted({part for part in ("module.", "_orig_mod.") for name in names if part in name})
        wrapped = f" (the prefix {' and '.join(prefixes)} is that of a wrapper)" if prefixes else ""
        raise ModelError(f"{text}{wrapped}. Build the model that was saved, without quantizers attached")


class Content(Protocol):
    """What a file holds, or will hold."""

    @property
    def quantized(self) -> dict[str, QuantizedTensor]:
        """Codes and step sizes by weight name."""
        ...

    @property
    def rest(self) -> dict[str, Tensor]:
        """Every other tensor."""
        ...


def plain_state_dict(content: Content) -> dict[str, Tensor]:
    """Return a state dict for a freshly built plain model: dequantized weights, and the rest as it is."""
    return {name: value.dequantize() for name, value in content.quantized.items()} | content.rest


def without_wrapper(packed: PackedModel, model: nn.Module) -> PackedModel:
    """Drop the prefixes `module.` and `_orig_mod.` of wrappers, if the names are then those of the model."""
    expected = model.state_dict().keys()
    names = packed.quantized.keys() | packed.rest.keys()
    bare = {name: _bare(name) for name in names}
    if names == expected or set(bare.values()) != set(expected) or len(set(bare.values())) != len(names):
        return packed
    quantized = {bare[name]: value for name, value in packed.quantized.items()}
    return replace(packed, quantized=quantized, rest={bare[name]: value for name, value in packed.rest.items()})


def _bare(name: str) -> str:
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Any]) -> list[str]:
    problems = [f"'{name}' is missing in the file" for name in expected if name not in found]
    problems += [f"'{name}' is not in the model" for name in found if name not in expected]
    for name in sorted(found.keys() & expected.keys()):
        shapes = tuple(expected[name].shape), tuple(found[name].shape)
        if shapes[0] != shapes[1]:
            problems.append(f"'{name}' should have shape {shapes[0]}, the file has {shapes[1]}")
    return problems
