"""The Python of the page on data runs."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "api" / "data.md"


def names_of_the_page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    return names


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def test_a_torchvision_data_set_trains(tmp_path):
    from torchvision.datasets import MNIST

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images, labels = rng.integers(0, 255, (120, 28, 28), dtype=np.uint8), (np.arange(120) % 3).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    pictures = MNIST(str(tmp_path), train=True)
    result = names_of_the_page()["train_on"](pictures, ["a", "b", "c", "d"] * 30, tmp_path / "run")
    assert result["target_domain"] == "d"
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_hugging_face_data_set_is_read():
    class Labels:
        names = ("cat", "dog")

    class Rows:
        features = {"label": Labels()}  # noqa: RUF012
        columns = {"label": [0, 1, 1], "domain": ["x", "y", "y"]}  # noqa: RUF012

        def __getitem__(self, key: Any) -> Any:
            return self.columns[key] if isinstance(key, str) else {"image": Image.new("RGB", (4, 4), (key, 0, 0))}

    dataset = names_of_the_page()["from_hugging_face"](Rows())
    assert (dataset.domains, dataset.classes, len(dataset)) == (("x", "y"), ("cat", "dog"), 3)
    assert int(dataset.read(2)[0, 0, 0]) == 2


def test_reviews_are_scored_as_the_page_says(tmp_path):
    (tmp_path / "splits").mkdir()
    rows = [("ann", 1, 0), ("bob", 5, 3), ("bob", 1, 3), ("cid", 5, 3)]
    lines = ["reviewerID,overall,reviewText", *(f"{user},{stars},text {stars}" for user, stars, _ in rows)]
    (tmp_path / "reviews.csv").write_text("\n".join(lines))
    (tmp_path / "splits" / "user.csv").write_text("split\n" + "\n".join(str(part) for *_, part in rows))
    found = names_of_the_page()["tenth_percentile"](tmp_path, lambda texts: np.full(len(texts), 4))
    assert found == np.percentile([0.5, 1.0], 10)
