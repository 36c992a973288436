"""Classify photographs with the model that lies beside this file. It needs onnxruntime, numpy and pillow.

    python predict.py photo.jpg new-site/
    python predict.py new-site/ --json
    python predict.py new-site/ --threshold 0.9

It prints a line per image: path, class, probability, and "accepted" or "rejected", with tabs between; with --json a
JSON object per line. An answer is accepted if its probability reaches the threshold (by default that of model.json; "-"
where there is none). Folders are searched for images, and what is passed over is counted on standard error. An image
that cannot be read is named there, the others are still classified, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qtdog.core.errors import DataError
from qtdog.core.printable import one_line, printable
from qtdog.data.decode import decode_resized
from qtdog.data.scan import PassedOver, images_below

BATCH = 16


class Classifier:
    """The model in a folder, ready to answer.

    Attributes:
        about: what model.json says.
        threshold: smallest probability of an accepted answer, or None.
    """

    def __init__(self, folder: Path, threshold: float | None = None) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise DataError("the library onnxruntime is missing: pip install onnxruntime numpy pillow") from error
        self.about: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        file = folder / self.about["file"]
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.about["sha256"]:
            raise DataError(f"{file} is damaged, or another one than model.json describes: copy the whole folder again")
        self.threshold = self.about["threshold"] if threshold is None else threshold
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def read(self, path: Path) -> np.ndarray:
        """Return an image file as the model takes it: uint8 (size, size, channels)."""
        preprocessing = self.about["preprocessing"]
        return decode_resized(path, preprocessing["image_size"], preprocessing["channels"])

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the probability of each class, shape (n, n_classes)."""
        return np.asarray(self._session.run(["probabilities"], {"images": np.stack(images)})[0])

    def rows(self, files: Iterable[Path]) -> Iterator[dict[str, Any]]:
        """Yield a row for each file: image, class, probability and accepted, or image and error."""
        files = list(files)
        for start in range(0, len(files), BATCH):
            rows: list[dict[str, Any]] = []
            images = []
            for file in files[start : start + BATCH]:
                rows.append({"image": os.fsencode(file).decode("utf-8", errors="backslashreplace")})
                try:
                    images.append(self.read(file))
                except DataError as error:
                    rows[-1]["error"] = str(error)
            found = iter(self.probabilities(images) if images else [])
            for row in rows:
                if "error" not in row:
                    probabilities = next(found)
                    best = int(probabilities.argmax())
                    sure = float(probabilities[best])
                    row |= {"class": self.about["classes"][best], "probability": sure}
                    row["accepted"] = None if self.threshold is None else sure >= self.threshold
                yield row


def images_among(paths: Sequence[Path], passed: PassedOver) -> list[Path]:
    """Return the image files among and below some paths, in order; `passed` counts the other files."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist")
        found += images_below(path, passed) if path.is_dir() else [path]
    return found


def probability(text: str) -> float:
    """Return a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise ValueError(text)
    return number


def print_answers() -> int:
    """Print a line per image and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument("--json", action="store_true", help="print a JSON object per line")
    parser.add_argument("--threshold", type=probability, help="smallest probability of an accepted answer, 0 to 1")
    options = parser.parse_args()
    try:
        classifier = Classifier(Path(__file__).resolve().parent, options.threshold)
        passed = PassedOver()
        files = images_among(options.paths, passed)
    except DataError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale without a letter of some name loses no row
    for line in filter(None, [passed.summary(), *passed.problems()]):
        print(line, file=sys.stderr)
    words = {None: "-", True: "accepted", False: "rejected"}
    n_failed = 0
    for row in classifier.rows(files):
        if "error" in row:
            n_failed += 1
            print(printable(row["error"]), file=sys.stderr)
        elif options.json:
            print(json.dumps(row))
        else:
            shown = (one_line(row["image"]), one_line(row["class"]))
            print(*shown, f"{row['probability']:.4f}", words[row["accepted"]], sep="\t")
    if n_failed:
        print(f"{n_failed} of {len(files)} images could not be read", file=sys.stderr)
    return int(n_failed > 0)


def run_script() -> int:
    """Run the script and return the exit code; Ctrl-C and a reader that goes away end it without a traceback."""
    try:
        code = print_answers()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would flush it once more at the end
        return 1
    return code


if __name__ == "__main__":
    sys.exit(run_script())
