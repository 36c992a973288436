"""What `qtdog predict` does with a model that reads text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtdog.ensemble.model import EnsembleModel
    from qtdog.training.load import ShippedModel


def text_predictions(shipped: ShippedModel | EnsembleModel, paths: Sequence[Path]) -> Iterator[Any]:
    """Yield a row (`text`, `class`, `probability`, …) for each line of the .txt files among and below `paths`.

    A file that cannot be read gives its error instead.

    Raises:
        DataError: a path is missing, or is a folder without such a file.
        ModelError: the file holds no vocabulary, and it cannot be had from elsewhere.
    """
    import torch

    from qtdog.cli.predict import BATCH, answer_columns
    from qtdog.core.errors import DataError
    from qtdog.models.text import make_tokeniser

    how = shipped.info.preprocessing
    tokenise = make_tokeniser(shipped.info.backbone, how.max_tokens, how.vocabulary)
    for file in find_texts(paths):
        try:
            lines = read_lines(file)
        except DataError as error:
            yield error
            continue
        for start in range(0, len(lines), BATCH):
            part = lines[start : start + BATCH]
            tokens = torch.from_numpy(tokenise([text for _, text in part])).long()
            for (number, _), told in zip(part, answer_columns(shipped, tokens), strict=True):
                yield {"text": f"{file}:{number}"} | told


def find_texts(paths: Sequence[Path]) -> list[Path]:
    """Return the .txt files among and below `paths`, in order (DataError if a path is missing or holds none)."""
    from qtdog.core.errors import DataError
    from qtdog.data.image_folder import require_path

    found: list[Path] = []
    for path in paths:
        require_path(path, "the text file or folder")
        inside = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"there is no .txt file in {path}; each line of one is a text")
        found += inside
    return found


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Return number (from 1) and text of each line that is not empty (DataError if the file is no UTF-8 text)."""
    from qtdog.core.errors import DataError

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
