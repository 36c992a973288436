import errno
import os
import runpy
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.transforms import Resize

from qtdog.core.errors import DataError
from qtdog.data import decode as module
from qtdog.data.decode import DecodeError, FileGoneError, decode, decode_bytes, decode_resized, to_square

STRESS = runpy.run_path(str(Path(__file__).parents[1] / "stress" / "decode_memory.py"))


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
    with pytest.raises(DataError, match=r"floating-point numbers, .* store all images of the data set with 8 bits"):
        decode(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0, 4095], "no value above 4,095"),
        ([0, 255], "no value above 255"),
        ([-1000, 3000], "from -1,000 to 3,000"),
        ([0, 1 << 24], "from 0 to 16,777,216"),
    ],
)
def test_values_without_a_white_are_refused_whatever_holds_them(tmp_path, values, reason):
    dtype = np.uint16 if min(values) >= 0 and max(values) < 1 << 16 else np.int32
    Image.fromarray(np.tile(np.array(values, dtype=dtype), (4, 2))).save(tmp_path / "a.tif")
    with pytest.raises(DecodeError, match=reason):
        decode(tmp_path / "a.tif")


@pytest.mark.parametrize("values", [[0, 4095], [5, 40_000]])
def test_signed_numbers_have_no_white(tmp_path, values):
    Image.fromarray(np.tile(np.array(values, dtype=np.int32), (4, 2))).save(tmp_path / "a.tif")
    with pytest.raises(DecodeError, match="nothing says which is white"):
        decode(tmp_path / "a.tif")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_twelve_bits_in_colors_of_sixteen_are_refused(tmp_path, channels):
    STRESS["png_16"](tmp_path / "a.png", channels, 0xC000, side=4)
    assert np.unique(decode(tmp_path / "a.png")).tolist() == [0xC0]
    STRESS["png_16"](tmp_path / "a.png", channels, 4095, side=4)
    with pytest.raises(DecodeError, match="16 bits, but no value above 4,095, and nothing says which is white"):
        decode(tmp_path / "a.png")
    STRESS["png_16"](tmp_path / "a.png", channels, 0, side=4)
    assert not decode(tmp_path / "a.png").any()


def test_a_black_sixteen_bit_image_is_black(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "a.png")
    assert not decode(tmp_path / "a.png").any()


def test_a_name_does_not_choose_the_format(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(DecodeError, match="a format that is not supported"):
        decode(tmp_path / "x.png")


def test_a_heic_image_is_named_with_what_to_install(tmp_path):
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))
    with pytest.raises(DecodeError, match="HEIC image, which 'pip install pillow-heif' makes readable"):
        decode(tmp_path / "x.heic")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match="no regular file") as caught:
        decode(tmp_path / "x.png")
    assert not isinstance(caught.value, DecodeError)


def test_failures_of_the_machine_are_no_failures_of_the_image(tmp_path, monkeypatch):
    Image.fromarray(noise(6, 5)).save(tmp_path / "a.png")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(DataError, match="Input/output error") as caught:
            decode(tmp_path / "a.png")
    assert not isinstance(caught.value, DecodeError)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(DataError, match="memory does not suffice") as caught:
            decode_bytes((tmp_path / "a.png").read_bytes(), "a.png")
    assert not isinstance(caught.value, DecodeError)
    with pytest.raises(FileGoneError):
        decode(tmp_path / "b.png")


def test_decoding_stays_within_its_memory(tmp_path, monkeypatch):
    Image.fromarray(np.full((500, 500), 40000, dtype=np.uint16)).save(tmp_path / "a.png")
    monkeypatch.setattr(module, "SMALL_BYTES", 1000)
    assert decode(tmp_path / "a.png").shape == (500, 500, 3)
    monkeypatch.setattr(module, "MAX_DECODE_BYTES", 2_000_000)
    n_bytes = 20 * 500 * 500 + (tmp_path / "a.png").stat().st_size
    with pytest.raises(DecodeError, match=f"decoding 500 x 500 pixels takes {n_bytes:,} bytes"):
        decode(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "AVIF"])
def test_what_is_too_large_is_refused_before_its_pixels_are_read(tmp_path, monkeypatch, kind):
    for name, value in (("SMALL_BYTES", 1000), ("MAX_DECODE_BYTES", 2000)):
        monkeypatch.setattr(module, name, value)

    def load(*_: object) -> None:
        raise AssertionError("the pixels were read")

    Image.fromarray(noise(40, 40)).save(tmp_path / "a", kind)
    with Image.open(tmp_path / "a") as image:
        kinds = {type(image), ImageFile.ImageFile}
    for opened in kinds:
        monkeypatch.setattr(opened, "load", load)
    with pytest.raises(DecodeError, match="decoding 40 x 40 pixels takes"):
        decode(tmp_path / "a")


def test_a_progressive_jpeg_counts_with_its_coefficients_however_small_it_is_made(tmp_path, monkeypatch):
    for name, value in (("LARGE_PIXELS", 1000), ("SMALL_BYTES", 1000), ("MAX_DECODE_BYTES", 2_000_000)):
        monkeypatch.setattr(module, name, value)
    Image.new("RGB", (600, 600)).save(tmp_path / "plain.jpg")
    Image.new("RGB", (600, 600)).save(tmp_path / "progressive.jpg", progressive=True)
    assert decode_resized(tmp_path / "plain.jpg", 32).shape == (32, 32, 3)
    with pytest.raises(DecodeError, match=r"progressive\.jpg is too large"):
        decode_resized(tmp_path / "progressive.jpg", 32)


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    Image.fromarray(noise(40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(module, "SMALL_BYTES", 1000)
    together, most = threading.Semaphore(0), []
    inner = module.to_pixels

    def counted(image: Image.Image, channels: int) -> np.ndarray:
        together.release()
        most.append(together._value)
        pixels = inner(image, channels)
        together.acquire()
        return pixels

    monkeypatch.setattr(module, "to_pixels", counted)
    threads = [threading.Thread(target=decode, args=(tmp_path / "a.png",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
