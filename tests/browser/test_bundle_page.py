"""The page of a bundle in headless Chromium: it resizes as Pillow does, and answers like the bundle's own script."""

from __future__ import annotations

import os
import runpy
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qtdog.data.decode import to_square
from qtdog.ensemble.prediction import find_images, predict_images
from qtdog.export.bundle import web_runtime, write_bundle
from qtdog.export.bundle_predict import Classifier
from qtdog.export.packed_source import read_packed_source
from qtdog.export.parity import LabelledImages
from qtdog.training.load_model import load_model

MADE = runpy.run_path(str(Path(__file__).parents[1] / "export" / "conftest.py"))
DIST = os.environ.get("QTDOG_ORT_WEB", "")


def resize_program() -> str:
    """Return the part of the page's program that resizes, as a function of the page."""
    text = (resources.files("qtdog") / "export" / "assets" / "page.js").read_text()
    head = text[text.index("const BITS") : text.index("const state")]
    return (
        head
        + text[text.index("// Weights of a triangle") : text.index("async function pixelsOf")]
        + "; window.resize = resize;"
    )


@pytest.mark.parametrize(
    ("height", "width", "channels", "size"),
    [(37, 53, 3, 16), (16, 16, 3, 16), (5, 9, 3, 24), (200, 3, 1, 32), (61, 30, 1, 30), (64, 48, 3, 31), (1, 1, 3, 8)],
)
def test_the_page_resizes_as_pillow_does(browser: Any, height: int, width: int, channels: int, size: int):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    pixels[: height // 2] = np.where(pixels[: height // 2] > 127, 255, 0)  # edges, where rounding and clipping show
    page = browser.new_page()
    page.evaluate(f"() => {{ {resize_program()} }}")
    found = page.evaluate(
        "([pixels, ...shape]) => Array.from(resize(Uint8Array.from(pixels), ...shape))",
        [pixels.ravel().tolist(), width, height, channels, size],
    )
    page.close()
    difference = np.array(found).reshape(size, size, channels) - to_square(pixels, size).astype(int)
    assert np.abs(difference).max() <= int(height > 1.2 * width)  # of tall images new Pillows begin with the columns


def draw_photos(folder: Path) -> None:
    """Write photographs that a browser can read: turned by EXIF, palettes, grey, CMYK, 16 bits."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    coarse = Image.new("RGB", (1, 1))
    for k in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize(
            (60, 44), Image.Resampling.BICUBIC
        )
        exif = Image.Exif()
        exif[0x0112] = k % 8 + 1
        coarse.save(folder / f"turned {k}.jpg", exif=exif, quality=95)
        coarse.save(folder / f"plain {k}.png")
    coarse.convert("L").save(folder / "grey.png")
    coarse.convert("P").save(folder / "palette.png")
    coarse.save(folder / "photo.webp", quality=95)
    coarse.save(folder / "bitmap.bmp")
    wide = (np.asarray(coarse.convert("L")).astype(np.uint16) << 8) + 7
    Image.fromarray(wide).save(folder / "sixteen bits.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")


@pytest.mark.skipif(not DIST, reason="QTDOG_ORT_WEB names no folder of onnxruntime-web (npm pack, package/dist)")
@pytest.mark.parametrize("name", ["onnx", "onnx-int8"])
def test_every_photograph_gets_the_answer_of_the_bundles_script(browser: Any, tmp_path: Path, name: str):
    model = MADE["make_packed"](tmp_path / "run" / "model.safetensors", "test_resnet", accept=0.4)
    photos = LabelledImages(MADE["smooth_photos"](seed=0), np.zeros(48, dtype=np.int64), ("indoor", "night"))
    calibration = photos if name == "onnx-int8" else None
    write_bundle(
        read_packed_source(model),
        tmp_path / "site",
        photos,
        name=name,
        calibration=calibration,
        runtime=web_runtime(Path(DIST)),
    )
    draw_photos(tmp_path / "photos")
    files = find_images([tmp_path / "photos"])
    expected = {Path(row["image"]).name: row for row in Classifier(tmp_path / "site").rows(files)}
    if name == "onnx":  # an integer graph may answer otherwise than the packed file, and says how often
        packed = zip(files, predict_images(load_model(model), files), strict=True)
        known = {file.name: row["class"] for file, row in packed if isinstance(row, dict)}
        assert known == {file: row["class"] for file, row in expected.items() if "class" in row}
    said: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto((tmp_path / "site" / "index.html").as_uri())
    page.locator("#state", has_text="Ready").wait_for(timeout=60_000)
    page.set_input_files("#files", [str(file) for file in files])
    page.locator("#state", has_text=f"{len(files)} photographs").wait_for(timeout=60_000)
    found = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('li')].map((li) => [li.dataset.name, {...li.dataset}]))"
    )
    page.close()
    assert said == []
    assert [url for url in fetched if not url.startswith(("file:", "data:", "blob:"))] == []
    assert found.keys() == expected.keys()
    tolerance = 0.03 if name == "onnx-int8" else 0.01  # decoders of JPEG differ by a step, which integers pass on
    for file, answer in expected.items():
        if "error" in answer:
            assert "class" not in found[file]
        else:
            assert found[file]["class"] == answer["class"]
            assert abs(float(found[file]["probability"]) - float(answer["probability"])) < tolerance
