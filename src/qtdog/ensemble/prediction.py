"""Predictions of one model or an ensemble: of images and texts, with their uncertainty."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from qtdog.core.errors import ConfigError, DataError, QtdogError
from qtdog.data.decode import decode_resized
from qtdog.data.image_folder import require_path
from qtdog.data.scan import PassedOver, images_below
from qtdog.ensemble.model import BATCH, EnsembleModel
from qtdog.models.text_backbones import make_tokenizer
from qtdog.training.calibration import LabeledLogits
from qtdog.training.load_model import LoadedModel


@dataclass(frozen=True)
class Uncertainty:
    """How unsure an ensemble is about each image.

    Attributes:
        entropy: of the predicted class distribution, nats, shape (n,); 0 is sure, log n_classes knows nothing.
        mutual_information: between class and member, nats, (n,): the part that comes from disagreement;
            0 for a single model.
        agreement: share of the members whose first choice is the ensemble's, (n,).
    """

    entropy: Tensor
    mutual_information: Tensor
    agreement: Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy -Σ p log p over the last dimension, nats.

    Args:
        probabilities: shape (…, n_classes), rows that add up to 1.

    Example:
        >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.0000, 0.6931])
    """
    return torch.special.entr(probabilities).sum(-1)


def uncertainty(member_logits: Tensor, temperature: float = 1.0) -> Uncertainty:
    """Return the uncertainty of an ensemble that averages logits.

    The ensemble predicts p = softmax(mean_m z_m / T) (paper Eq. 6). Its members' average p̄ = mean_m softmax(z_m / T)
    splits the total uncertainty H(p̄) into mean_m H(p_m), which each member has alone, and the rest, the mutual
    information between class and member (Depeweg et al., ICML 2018, Eq. 5; BALD, Houlsby et al., 2011). The entropy is
    that of p, the distribution that is reported.

    Args:
        member_logits: shape (members, n, n_classes).
        temperature: T.

    Example:
        >>> same = torch.tensor([[[4.0, 0.0]], [[4.0, 0.0]]])
        >>> opposed = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]]])
        >>> [round(uncertainty(logits).mutual_information.item(), 3) for logits in (same, opposed)]
        [0.0, 0.603]
    """
    scaled = member_logits / temperature
    members, mean = scaled.softmax(-1), scaled.mean(0)
    shared = entropy(members).mean(0)
    choice = mean.argmax(-1)
    return Uncertainty(
        entropy=entropy(mean.softmax(-1)),
        # rounding may leave a tiny negative number where all members say the same
        mutual_information=(entropy(members.mean(0)) - shared).clamp(min=0),
        agreement=(member_logits.argmax(-1) == choice).float().mean(0),
    )


Floats = npt.NDArray[np.float64]


def rejected(uncertainties: npt.ArrayLike, frac: float) -> npt.NDArray[np.bool_]:
    """Return which images to abstain on: the least certain share, rounded down; among equals the later ones.

    Args:
        uncertainties: higher is less sure, shape (n,).
        frac: share to reject, 0 ≤ frac < 1.

    Raises:
        ConfigError: the share is out of range.

    Example:
        >>> rejected([0.1, 0.9, 0.5, 0.2], 0.25).tolist()
        [False, True, False, False]
    """
    if not 0 <= frac < 1:
        raise ConfigError(f"the share to reject must be at least 0 and below 1, not {frac:g}")
    values = np.asarray(uncertainties, dtype=np.float64)
    mask = np.zeros(len(values), dtype=bool)
    n_rejected = int(frac * len(values) + 1e-9)
    if n_rejected:
        mask[np.argsort(values, kind="stable")[-n_rejected:]] = True
    return mask


def unknown_auroc(known: npt.ArrayLike, unknown: npt.ArrayLike) -> float:
    """Return the probability that an image of an unknown kind is less certain than a known one: the area under the ROC.

    0.5 is chance, 1 separates perfectly (Hendrycks and Gimpel, ICLR 2017).

    Args:
        known: uncertainties of images of the classes that the model knows, shape (n,).
        unknown: uncertainties of other images, shape (m,).

    Raises:
        ConfigError: one of the two is empty.

    Example:
        >>> unknown_auroc([0.1, 0.3], [0.2, 0.9])
        0.75
    """
    first, second = np.asarray(known, dtype=np.float64), np.asarray(unknown, dtype=np.float64)
    if not (len(first) and len(second)):
        raise ConfigError("the comparison needs known and unknown images; one folder gave none")
    truth = np.concatenate([np.zeros(len(first)), np.ones(len(second))])
    return float(roc_auc_score(truth, np.concatenate([first, second])))


AnyModel = LoadedModel | EnsembleModel
Row = dict[str, Any]
"""What is predicted for one input, by column: `class`, `probability`, `entropy`, …"""


@dataclass(frozen=True)
class Predictions:
    """Predictions for n images.

    Attributes:
        probabilities: softmax of the mean logits at the model's temperature, shape (n, n_classes).
        uncertainty: of each image; for a single model its mutual information is 0 and its agreement 1.
    """

    probabilities: Tensor
    uncertainty: Uncertainty


def temperature_of(model: AnyModel) -> float:
    """Return the temperature of a model's probabilities: 1 in a file from before it was fitted."""
    return model.info.temperature


@torch.no_grad()
def member_logits(model: AnyModel, images: Tensor) -> Tensor:
    """Return the logits (members, n, n_classes) of normalized images (n, C, H, W); one member for a single model."""
    return model.member_logits(images) if isinstance(model, EnsembleModel) else model(images)[None]


def collect_logits(model: AnyModel, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> LabeledLogits:
    """Return the members' logits and the labels of all batches.

    Args:
        model: on `device`.
        batches: normalized images and labels.
        device: where to compute.
    """
    parts = [
        LabeledLogits(member_logits(model, images.to(device)).float().cpu(), labels.cpu()) for images, labels in batches
    ]
    return LabeledLogits.concatenate(parts)


def predict_from_logits(logits: Tensor, temperature: float = 1.0) -> Predictions:
    """Return probabilities and uncertainty of logits (members, n, n_classes).

    Example:
        >>> found = predict_from_logits(torch.tensor([[[0.0, 0.0]], [[2.0, 2.0]]]))
        >>> found.probabilities.tolist(), round(found.uncertainty.entropy.item(), 4)
        ([[0.5, 0.5]], 0.6931)
    """
    return Predictions((logits.mean(0) / temperature).softmax(-1), uncertainty(logits, temperature))


def find_images(paths: Sequence[Path], passed: PassedOver | None = None) -> list[Path]:
    """Return the image files among and below `paths`, in order.

    Args:
        paths: files and folders.
        passed: where to count the files that are no images; default: nowhere.

    Raises:
        DataError: a path is missing, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        require_path(path, "the image or folder")
        inside = images_below(path, passed) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"there is no image in {path} (jpg, png, webp, bmp, tif, gif or ppm)")
        found += inside
    return found


def shown_path(path: Path) -> str:
    r"""Return a path as text that can be written anywhere: bytes that are not UTF-8 become `\xNN`.

    Example:
        >>> shown_path(Path("sch\udcf6n.png"))
        'sch\\xf6n.png'
    """
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def predict_images(model: AnyModel, files: Sequence[Path]) -> Iterator[Row | QtdogError]:
    """Yield a row (`image`, `class`, `probability`, …) for each image file, in order, or the error that it gave."""
    preprocessing = model.info.preprocessing
    for start in range(0, len(files), BATCH):
        rows: list[Row | QtdogError] = []
        arrays = []
        for file in files[start : start + BATCH]:
            try:
                arrays.append(decode_resized(file, preprocessing.image_size, preprocessing.channels))
                rows.append({"image": shown_path(file)})
            except QtdogError as error:
                rows.append(error)
        if arrays:
            columns = prediction_rows(model, torch.from_numpy(np.stack(arrays)))
            for row, values in zip((row for row in rows if isinstance(row, dict)), columns, strict=True):
                row |= values
        yield from rows


def find_texts(paths: Sequence[Path]) -> list[Path]:
    """Return the .txt files among and below `paths`, in order.

    Raises:
        DataError: a path is missing, or a folder holds no such file.
    """
    found: list[Path] = []
    for path in paths:
        require_path(path, "the text file or folder")
        inside = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"there is no .txt file in {path}; each line of one is a text")
        found += inside
    return found


def predict_texts(model: AnyModel, files: Sequence[Path]) -> Iterator[Row | QtdogError]:
    """Yield a row (`text`, `class`, `probability`, …) for each line of each file, or the error that a file gave.

    Raises:
        ModelError: the model's file holds no vocabulary, and it cannot be had from elsewhere.
    """
    preprocessing = model.info.preprocessing
    tokenize = make_tokenizer(model.info.backbone, preprocessing.max_tokens, preprocessing.vocabulary)
    for file in files:
        try:
            lines = _read_lines(file)
        except DataError as error:
            yield error
            continue
        for start in range(0, len(lines), BATCH):
            part = lines[start : start + BATCH]
            tokens = torch.from_numpy(tokenize([text for _, text in part])).long()
            for (number, _), values in zip(part, prediction_rows(model, tokens), strict=True):
                yield {"text": f"{file}:{number}"} | values


def _read_lines(file: Path) -> list[tuple[int, str]]:
    """Return number (from 1) and text of each line that is not empty."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def prediction_rows(model: AnyModel, images: Tensor) -> list[Row]:
    """Return a row for each image, uint8 (n, H, W, C), or row of tokens, int64 (n, length)."""
    device = next(model.parameters()).device
    inputs = model.prepare(images).to(device)
    return _rows(model, member_logits(model, inputs))


def _rows(model: AnyModel, logits: Tensor) -> list[Row]:
    """Return a row for each image whose logits (members, n, n_classes) are given."""
    found = predict_from_logits(logits, temperature_of(model))
    best = found.probabilities.max(1)
    columns = {
        "class": [model.info.classes[index] for index in best.indices.tolist()],
        "probability": best.values.tolist(),
        "entropy": found.uncertainty.entropy.tolist(),
    }
    if len(logits) > 1:
        columns["mutual_information"] = found.uncertainty.mutual_information.tolist()
        columns["agreement"] = found.uncertainty.agreement.tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
