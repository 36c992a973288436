"""A packed file, single or an ensemble, as what is exported."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

from qtdog.conversion.ship import fill
from qtdog.core.errors import FormatError, ModelError
from qtdog.core.quantized import QuantizedTensor
from qtdog.export.deployed import OUTPUTS, Deployed
from qtdog.export.info import ExportInfo
from qtdog.packing.ensemble_file import is_ensemble, load_ensemble
from qtdog.packing.packed_file import PackedModel, load_packed
from qtdog.training.shipped import ModelInfo, empty_network, read_info

STRUCTURE = ("backbone", "feature_layer", "feature_params", "classes", "preprocessing")


@dataclass(frozen=True)
class Subject:
    """The frozen content of a packed file.

    Attributes:
        path: the file.
        members: codes, step sizes and the rest, one for each network.
        infos: what each member says of itself.
        temperature: of the probabilities.
    """

    path: Path
    members: tuple[PackedModel, ...]
    infos: tuple[ModelInfo, ...]
    temperature: float = 1.0

    def info(self, name: str) -> ExportInfo:
        """Return the description of an export to the format called `name`, nothing being measured yet."""
        first = self.infos[0]
        return ExportInfo(
            format=name,
            backbone=first.backbone,
            classes=first.classes,
            preprocessing=first.preprocessing,
            source_domains=first.source_domains,
            target_domain=first.target_domain,
            n_members=len(self.members),
            temperature=self.temperature,
            outputs=OUTPUTS[len(self.members) > 1],
        )

    def module(self) -> Deployed:
        """Return the model as a module from uint8 images to the outputs, weights dequantized, in evaluation mode.

        Raises:
            ModelError: the backbone is not known here, or does not fit.
        """
        empty = empty_network(self.infos[0])
        networks = [fill(member, copy.deepcopy(empty), self.path) for member in self.members]
        return Deployed(networks, self.infos[0].preprocessing, self.temperature)

    def codes(self) -> dict[str, QuantizedTensor]:
        """Return the integer codes by the names that the weights have in `module()`."""
        return {
            f"members.{index}.{name}": value
            for index, member in enumerate(self.members)
            for name, value in member.quantized.items()
        }


def read_subject(path: Path) -> Subject:
    """Return the content of a packed file, one model or an ensemble.

    Raises:
        FormatError: missing, truncated, hostile, of another version, or members that do not go together.
        ModelError: it reads text.
    """
    if not is_ensemble(path):
        packed = load_packed(path)
        return Subject(path, (packed,), (_image_info(path, packed),))
    whole = load_ensemble(path)
    infos = tuple(_image_info(path, member) for member in whole.members)
    for name in STRUCTURE:
        if any(getattr(info, name) != getattr(infos[0], name) for info in infos):
            raise FormatError(f"{path}: the members of an ensemble have one {name}, found several")
    return Subject(path, whole.members, infos, _temperature(path, whole.about.get("temperature", 1.0)))


def _image_info(path: Path, packed: PackedModel) -> ModelInfo:
    info = read_info(path, packed.metadata)
    if info.preprocessing.max_tokens:
        raise ModelError(f"{path} reads text; only models of images can be exported")
    return info


def _temperature(path: Path, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise FormatError(f"{path}: the temperature should be positive and finite, found {str(value)[:40]}")
    return float(value)
