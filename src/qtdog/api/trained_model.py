"""`qtdog.load`: a model file or a run folder as an object that predicts, is evaluated and is exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from qtdog.api.display import CountingBar, as_frame
from qtdog.api.python_words import in_python
from qtdog.core.errors import DataError
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.data.decode import decode_resized, to_pixels, to_square
from qtdog.data.open import open_any, without_unreadable
from qtdog.ensemble.model import EnsembleInfo
from qtdog.ensemble.model import load as load_file
from qtdog.ensemble.prediction import (
    AnyModel,
    find_images,
    member_logits,
    predict_from_logits,
    temperature_of,
)
from qtdog.ensemble.scoring import score_domains
from qtdog.export.export import Exported
from qtdog.export.export import export as export_file
from qtdog.export.formats import FORMATS, format_for
from qtdog.export.packed_source import read_packed_source
from qtdog.export.parity import Draw, draw_export_images
from qtdog.models.text_backbones import make_tokenizer
from qtdog.runs.find import find_model
from qtdog.training.load_model import ModelInfo, open_training_data

BATCH = 64


@dataclass(frozen=True)
class ImagePredictions:
    """What a model predicts for n images (or texts).

    Attributes:
        inputs: what each one is: its path, or its position in the list that was given.
        classes: the most probable class of each.
        probabilities: of every class, shape (n, n_classes).
        class_names: names of the columns of `probabilities`.
        entropy: of the probabilities, in nats (0 is sure), shape (n,).
        mutual_information: how far an ensemble's members disagree, in nats, shape (n,); 0 for a single model.
        agreement: share of the members that have the same class first, shape (n,); 1 for a single model.
    """

    inputs: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: npt.NDArray[np.float32]
    class_names: tuple[str, ...]
    entropy: npt.NDArray[np.float32]
    mutual_information: npt.NDArray[np.float32]
    agreement: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.classes)

    def rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each image: input, class, its probability, and the uncertainty."""
        best = self.probabilities.max(1)
        columns = (self.inputs, self.classes, best, self.entropy, self.mutual_information, self.agreement)
        names = ("image", "class", "probability", "entropy", "mutual_information", "agreement")
        return [
            {name: value.item() if hasattr(value, "item") else value for name, value in zip(names, row, strict=True)}
            for row in zip(*columns, strict=True)
        ]

    def table(self) -> Any:
        """Return the rows as a pandas DataFrame, or as they are where pandas is not installed."""
        return as_frame(self.rows())

    def _repr_html_(self) -> str | None:
        return as_frame(self.rows(), html=True)


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a data set.

    Attributes:
        domains: for each domain what `ensemble.scoring.score_domains` gives: `accuracy` (a fraction), its 95 %
            `interval`, `loss`, `n`, `ece`, `brier`, `risk_at_90`, and `classes` with the mistakes of each class.
        source_domains: those that the model was trained on.
    """

    domains: Mapping[str, Mapping[str, Any]]
    source_domains: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """The mean accuracy of the domains."""
        return sum(score["accuracy"] for score in self.domains.values()) / len(self.domains)

    def rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each domain, without its classes."""
        return [
            {"domain": domain, "trained_on": domain in self.source_domains}
            | {name: value for name, value in score.items() if name != "classes"}
            for domain, score in self.domains.items()
        ]

    def table(self) -> Any:
        """Return the rows as a pandas DataFrame, or as they are where pandas is not installed."""
        return as_frame(self.rows())

    def _repr_html_(self) -> str | None:
        return as_frame(self.rows(), html=True)


class TrainedModel(nn.Module):
    """A model or an ensemble from a file, ready to use; as a module it maps normalized images to logits.

    Attributes:
        path: of the file.
        model: the network (`training.load_model.LoadedModel`) or the networks (`ensemble.model.EnsembleModel`) in it.
    """

    def __init__(self, path: Path, model: AnyModel) -> None:
        super().__init__()
        self.path = path
        self.model = model
        self.eval()

    @property
    def info(self) -> ModelInfo | EnsembleInfo:
        """What the file says of itself: classes, preprocessing, domains, accuracy."""
        return self.model.info

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.info.classes

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, n_classes) of normalized images (n, C, H, W)."""
        return self.model(images)

    def prepare(self, images: Tensor) -> Tensor:
        """Return the network's input (n, C, H, W) for uint8 images (n, H, W, C) of the model's size."""
        return self.model.prepare(images)

    def probabilities(self, images: Tensor) -> Tensor:
        """Return class probabilities (n, n_classes) of uint8 images (n, H, W, C) of the model's size."""
        return self.model.probabilities(images)

    @in_python
    def predict(self, images: Any, *, progress: bool = True) -> ImagePredictions:
        """Return class, probabilities and uncertainty of images of any size.

        Args:
            images: one image or a list: paths of images and folders, PIL images, arrays or tensors uint8 (H, W) or
                (H, W, C). For a model of text: one text or a list.
            progress: show a bar.

        Raises:
            DataError: a path is missing, or an image cannot be read; the text names it.

        Example:
            >>> import qtdog
            >>> model = qtdog.load("runs/lsq")
            >>> array, picture = np.zeros((28, 28), dtype=np.uint8), Image.new("RGB", (40, 30))
            >>> picture.save("a.png")
            >>> found = model.predict(["a.png", picture, array], progress=False)
            >>> found.inputs, found.probabilities.shape, found.classes[0] in model.classes
            (('a.png', '1', '2'), (3, 10), True)
        """
        is_list = isinstance(images, (list, tuple)) or (
            isinstance(images, (np.ndarray, Tensor)) and np.ndim(np.asarray(images)) == 4
        )
        given = list(images) if is_list else [images]
        if not given:
            raise DataError("there is no image to predict")
        bar = CountingBar("images") if progress else None
        names, logits = self._text_logits(given) if self._reads_text else self._image_logits(given, bar)
        found = predict_from_logits(logits, temperature_of(self.model))
        classes = tuple(self.classes[index] for index in found.probabilities.argmax(1).tolist())
        unsure = (found.uncertainty.entropy, found.uncertainty.mutual_information, found.uncertainty.agreement)
        entropy, information, agreement = (value.float().numpy() for value in unsure)
        table = found.probabilities.float().numpy()
        return ImagePredictions(tuple(names), classes, table, self.classes, entropy, information, agreement)

    @property
    def _reads_text(self) -> bool:
        return bool(self.info.preprocessing.max_tokens)

    def _image_logits(self, given: Sequence[Any], progress: Progress) -> tuple[list[str], Tensor]:
        items = list(_each(given))
        size, channels = self.info.preprocessing.image_size, self.info.preprocessing.channels
        parts = []
        for start in range(0, len(items), BATCH):
            part = [_pixels(name, item, size, channels) for name, item in items[start : start + BATCH]]
            parts.append(self._logits(torch.from_numpy(np.stack(part))))
            if progress is not None:
                progress(min(len(items), start + BATCH), len(items))
        return [name for name, _ in items], torch.cat(parts, 1)

    def _text_logits(self, given: Sequence[Any]) -> tuple[list[str], Tensor]:
        preprocessing = self.info.preprocessing
        tokenize = make_tokenizer(self.info.backbone, preprocessing.max_tokens, preprocessing.vocabulary)
        parts = [
            self._logits(torch.from_numpy(tokenize([str(text) for text in given[start : start + BATCH]])).long())
            for start in range(0, len(given), BATCH)
        ]
        return [str(number) for number in range(len(given))], torch.cat(parts, 1)

    def _logits(self, inputs: Tensor) -> Tensor:
        device = next(self.parameters()).device
        return member_logits(self.model, self.prepare(inputs).to(device)).float().cpu()

    @in_python
    def evaluate(
        self, data: str | Path | DomainDataset, *, skip_unreadable: bool = False, progress: bool = True
    ) -> Evaluation:
        """Return the scores on every domain of a data set; classes are matched by name.

        Args:
            data: a name, a folder DOMAIN/CLASS/image, a list, or a data set.
            skip_unreadable: leave out images that cannot be read.
            progress: show a bar.

        Raises:
            DataError: the data set has a class that the model does not know, other channels, or an unreadable image.

        Example:
            >>> import qtdog
            >>> samples = [(np.zeros((28, 28), dtype=np.uint8), str(digit)) for digit in range(10)]
            >>> found = qtdog.load("runs/lsq").evaluate(qtdog.Dataset({"black": samples}), progress=False)
            >>> round(found.accuracy, 2), found.rows()[0]["n"]
            (0.1, 10)
        """
        bar = CountingBar("decoding images") if progress else None
        dataset = data if isinstance(data, DomainDataset) else open_any(str(data), min_domains=1)
        dataset = without_unreadable(dataset, bar) if skip_unreadable else dataset
        return Evaluation(score_domains(self.model, dataset, progress=bar), self.info.source_domains)

    @in_python
    def export(
        self,
        path: str | Path,
        *,
        data: str | Path | DomainDataset | None = None,
        format: str | None = None,
        domains: Sequence[str] = (),
        num_calibration: int = 256,
        num_check: int = 1024,
        seed: int = 0,
        force_target: bool = False,
        progress: bool = True,
    ) -> Exported:
        """Write the model for another runtime, and keep the file only if it answers like the packed model.

        Args:
            path: the file to write.
            data: source images to compare on; None for those that the run beside the file was trained on.
            format: a name of `export.formats.FORMATS`; None for the float one that the path's ending means.
            domains: take images of these alone; none for every source domain.
            num_calibration: images that set the ranges of integer activations.
            num_check: images that the file is compared on.
            seed: of the draw of images.
            force_target: accept the domain that was held out.
            progress: show bars.

        Raises:
            ConfigError: an unknown format, or no data.
            DataError, ModelError, RunError: as in `export.export.export`.

        Example:
            >>> import qtdog
            >>> made = qtdog.load("runs/lsq").export("model.h", data="rotated-digits", num_check=8, progress=False)
            >>> made.path.name, made.parity.agreement_frac
            ('model.h', 1.0)
        """
        out = Path(path)
        name = format_for(format, out)
        source = read_packed_source(self.path)
        draw = Draw(num_check, seed, tuple(domains), force_target)
        bar = CountingBar("reading images") if progress else None
        given = None if data is None else str(data)
        dataset = data if isinstance(data, DomainDataset) else open_training_data([self.path], given, progress=bar)
        watch = CountingBar if progress else (lambda title: None)
        n_calibration = num_calibration if FORMATS[name].integer else 0
        calibration, images = draw_export_images(dataset, source, draw, n_calibration, watch)
        return export_file(source, out, name, images, calibration=calibration, watch=watch)

    def __repr__(self) -> str:
        kind = "ensemble" if isinstance(self.info, EnsembleInfo) else "model"
        target = f", unseen domain {self.info.target_domain}" if self.info.target_domain else ""
        return (
            f"{type(self).__name__}({kind} of {self.info.backbone}, {len(self.classes)} classes{target}: {self.path})"
        )


def _each(given: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield a name and the image of each item; a folder is all images below it."""
    for number, item in enumerate(given):
        if isinstance(item, (str, Path)):
            yield from ((str(file), file) for file in find_images([Path(item)]))
        else:
            yield str(number), item


def _pixels(name: str, item: Any, size: int, channels: int) -> npt.NDArray[np.uint8]:
    if isinstance(item, Path):
        return decode_resized(item, size, channels)
    if isinstance(item, Image.Image):
        return to_square(to_pixels(item, channels), size)
    array = np.asarray(item)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        text = "give a path, a PIL image, or an array uint8 (H, W), (H, W, 1) or (H, W, 3)"
        raise DataError(f"image {name}: {text}; got {array.dtype} {array.shape}")
    flat = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return to_square(to_pixels(Image.fromarray(flat), channels), size)


@in_python
def load(path: str | Path, *, device: str | torch.device = "cpu") -> TrainedModel:
    """Return the model in a file or a run folder: one model or an ensemble.

    Args:
        path: a `model.safetensors`, or the folder that it is in.
        device: where to put it.

    Raises:
        FormatError: the file is missing, truncated, hostile or of another version, or the run is not finished.
        ModelError: its backbone is not known here, or does not fit.

    Example:
        >>> import qtdog
        >>> model = qtdog.load("runs/lsq")
        >>> model.info.bits, len(model.classes), model.info.target_domain
        (7, 10, '75')
    """
    file = find_model(path)
    return TrainedModel(file, load_file(file, device=device))
