"""The batched augmentation against torchvision's v2 functions, applied to one image after another."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from qtdog.data.augment import CHUNK_PIXELS, AugmentParameters, BufferPool, augment, draw_parameters

JITTER = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pictures(n: int, size: int, channels: int = 3) -> Tensor:
    """Noise, smooth ramps, and the awkward ones: black, white, grey, pure colors, two equal channels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, size, size, channels), generator=generator, dtype=torch.uint8)
    ramp = torch.linspace(0, 255, size).to(torch.uint8)
    images[0] = ramp[:, None, None]
    images[1] = 0
    images[2] = 255
    images[3] = 128
    if channels == 3:
        images[4] = torch.tensor([255, 0, 0], dtype=torch.uint8)
        images[5] = torch.tensor([0, 200, 200], dtype=torch.uint8)
        images[6, :, :, 1] = images[6, :, :, 2]
    return images


def one_by_one(images: Tensor, parameters: AugmentParameters) -> Tensor:
    results = []
    for i, image in enumerate(images):
        top, left, height, width = parameters.crop[i].tolist()
        x = functional.resized_crop(image.permute(2, 0, 1), top, left, height, width, list(image.shape[:2]))
        x = functional.horizontal_flip(x) if parameters.flip[i] else x
        x = functional.to_dtype(x, torch.float32, scale=True)
        for operation in parameters.order[i].tolist():
            x = JITTER[operation](x, parameters.factors[i, operation].item())
        results.append(functional.rgb_to_grayscale(x, len(x)) if parameters.grey[i] and len(x) == 3 else x)
    return torch.stack(results)


def drawn(n: int, size: int, seed: int = 0) -> AugmentParameters:
    return draw_parameters(torch.Generator().manual_seed(seed), n, size)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("n", "size"), [(120, 24), (60, 97), (9, 224)])
def test_equal_to_torchvision_one_by_one(n: int, size: int, channels: int) -> None:
    images, parameters = pictures(n, size, channels), drawn(n, size)
    ours = augment(images, parameters)
    assert ours.shape == (n, channels, size, size)
    assert torch.allclose(ours, one_by_one(images, parameters), rtol=0, atol=1e-5)


def test_smooth_gradients_of_all_hues() -> None:
    """Each edge of the color cube's hexagon, where the sextants meet."""
    steps = torch.linspace(0, 1, 32)
    hues = torch.stack([torch.stack(torch.meshgrid(steps, steps, indexing="ij")).flatten(1).T[:, [0, 1, 1]]])
    corners = torch.cat([hues[..., order] for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0])])
    images = (corners.reshape(3, 32, 32, 3) * 255).round().to(torch.uint8).repeat(8, 1, 1, 1)
    parameters = drawn(24, 32)
    assert torch.allclose(augment(images, parameters), one_by_one(images, parameters), rtol=0, atol=1e-5)


def test_normalization_is_fused() -> None:
    images, parameters = pictures(20, 32), drawn(20, 32)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    expected = functional.normalize(augment(images, parameters), list(mean), list(std))
    assert torch.allclose(augment(images, parameters, mean=mean, std=std), expected, rtol=0, atol=1e-5)


def test_the_result_is_channels_last_and_the_input_unchanged() -> None:
    images = pictures(10, 32)
    before = images.clone()
    assert augment(images, drawn(10, 32)).is_contiguous(memory_format=torch.channels_last)
    assert images.equal(before)


@pytest.mark.parametrize(("size", "channels"), [(32, 3), (200, 3), (200, 1)])
def test_an_image_does_not_depend_on_the_others(size: int, channels: int) -> None:
    """Bit for bit: several processes, each with a share of the batch, see what one process sees."""
    images = pictures(32 if size < 100 else 12, size, channels)
    parameters = drawn(len(images), size)
    whole = augment(images, parameters)
    for rows in (torch.arange(0, len(images), 2), torch.tensor([5]), torch.tensor([11, 0])):
        assert augment(images[rows], parameters.take(rows)).equal(whole[rows])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_changes_nothing(channels: int) -> None:
    images, parameters = pictures(8, 190, channels), drawn(8, 190)
    two = augment(images, parameters)
    torch.set_num_threads(1)
    assert augment(images, parameters).equal(two)


def test_used_memory_is_overwritten_completely() -> None:
    images, parameters, pool = pictures(30, 32), drawn(30, 32), BufferPool()
    expected = augment(images, parameters)
    for _ in range(3):
        result = augment(images, parameters, pool=pool)
        assert result.equal(expected)
        result.fill_(float("nan"))


def test_an_image_larger_than_a_chunk() -> None:
    size = int(CHUNK_PIXELS**0.5) + 1
    images, parameters = pictures(7, size)[:1], drawn(1, size)
    assert torch.allclose(augment(images, parameters), one_by_one(images, parameters), rtol=0, atol=1e-5)
