from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import Resize

from qtdog.core.errors import DataError
from qtdog.data import decode as module
from qtdog.data.decode import decode, decode_resized, to_square


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(50, 31), (16, 16), (9, 40), (227, 227)])
def test_resizing_equals_torchvision_on_pil_images(shape: tuple[int, int]) -> None:
    pixels = noise(*shape)
    expected = np.asarray(Resize([24, 24])(Image.fromarray(pixels)))
    assert np.array_equal(to_square(pixels, 24), expected)


def test_file_and_array_are_resized_alike(tmp_path: Path) -> None:
    Image.fromarray(noise(33, 20)).save(tmp_path / "a.png")
    assert np.array_equal(decode_resized(tmp_path / "a.png", 12), to_square(noise(33, 20), 12))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_rgb_or_grey(tmp_path: Path, mode: str, channels: int) -> None:
    suffix = ".tif" if mode == "CMYK" else ".png"
    Image.fromarray(noise(6, 5)).convert(mode).save(tmp_path / f"a{suffix}")
    pixels = decode(tmp_path / f"a{suffix}", channels)
    assert pixels.shape == (6, 5, channels)
    assert pixels.dtype == np.uint8


def test_a_palette_with_transparency_raises_no_warning(tmp_path: Path) -> None:
    Image.fromarray(noise(6, 5)).convert("P").save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert decode(tmp_path / "a.png").shape == (6, 5, 3)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 300, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", 1).ravel().tolist() == [0, 1, 128, 255]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    Image.fromarray(noise(6, 9)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "a.png"), np.rot90(noise(6, 9), -1))


@pytest.mark.parametrize("n_bytes", [0, 3, 20, 100, 400])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_truncated_image_is_named(tmp_path: Path, n_bytes: int, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    Image.fromarray(noise(40, 40)).save(path)
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(DataError, match=rf"broken\{suffix} cannot be read as an image .*qtdog data verify"):
        decode(path)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"a\.jpg .*not an image"):
        decode(tmp_path / "a.jpg")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jpg does not exist"):
        decode(tmp_path / "a.jpg")


@pytest.mark.parametrize("limit", [700, 1200])  # Pillow raises above twice its limit, and warns above it
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    Image.fromarray(noise(40, 40)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"bomb\.png is too large to be safe"):
        decode(tmp_path / "bomb.png")


def test_a_very_large_jpeg_is_made_smaller_while_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = np.linspace(0, 255, 480 * 640 * 3).reshape(480, 640, 3).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / "a.jpg", quality=95)
    whole = decode_resized(tmp_path / "a.jpg", 32).astype(int)
    monkeypatch.setattr(module, "LARGE_PIXELS", 100_000)
    assert decode(tmp_path / "a.jpg").shape == (480, 640, 3)
    assert decode(tmp_path / "a.jpg", size=32).shape == (120, 160, 3)  # an eighth would be less than twice 32
    assert np.abs(decode_resized(tmp_path / "a.jpg", 32).astype(int) - whole).max() <= 3
    Image.fromarray(gradient).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", size=32).shape == (480, 640, 3)


def test_a_large_turned_jpeg_is_still_put_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE_PIXELS", 100)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=exif)
    height, width, _ = decode(tmp_path / "a.jpg", size=8).shape
    assert height > width


def test_pixels_without_a_white_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="floating-point numbers; store them with 8 or 16 bits"):
        decode(tmp_path / "a.tif")
