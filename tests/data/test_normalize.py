import pytest
import torch
from torchvision.transforms import functional

from qtdog.data.augment import normalize


@pytest.mark.parametrize(
    ("channels", "mean", "std"), [(1, (0.13,), (0.31,)), (3, (0.485, 0.456, 0.406), (0.2, 0.3, 0.4))]
)
def test_equal_to_torchvision(channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images = torch.randint(0, 256, (5, 8, 9, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = normalize(images, mean, std)
    for image, result in zip(images, ours, strict=True):
        expected = functional.normalize(functional.to_tensor(image.numpy()), list(mean), list(std))
        assert torch.allclose(result, expected, rtol=0, atol=2e-6)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_an_image_does_not_depend_on_the_others() -> None:
    images = torch.randint(0, 256, (64, 30, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert normalize(images[17:18], mean, std).equal(normalize(images, mean, std)[17:18])
