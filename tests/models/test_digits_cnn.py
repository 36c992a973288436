import pytest
import torch
from torch import nn

from qtdog.models.featurizers import WIDTHS, digits_cnn


class Reference(nn.Module):
    """The published network, written out layer by layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, 64, 3, 1, padding=1), nn.GroupNorm(8, 64)
        self.conv2, self.norm2 = nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.GroupNorm(8, 128)
        self.conv3, self.norm3 = nn.Conv2d(128, 128, 3, 1, padding=1), nn.GroupNorm(8, 128)
        self.conv4, self.norm4 = nn.Conv2d(128, 128, 3, 1, padding=1), nn.GroupNorm(8, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(torch.relu(self.conv1(x)))
        x = self.norm2(torch.relu(self.conv2(x)))
        x = self.norm3(torch.relu(self.conv3(x)))
        x = self.norm4(torch.relu(self.conv4(x)))
        return x.mean((2, 3))


def test_mnist_cnn_computes_what_the_published_network_does():
    ours, theirs = digits_cnn(WIDTHS["mnist_cnn"], channels=2), Reference(2)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours.load_state_dict(dict(zip(ours.state_dict(), state.values(), strict=True)))
    images = torch.rand(3, 2, 28, 28, generator=generator)
    torch.testing.assert_close(ours(images), theirs(images))


def test_the_small_one_has_a_quarter_of_the_width():
    narrow = digits_cnn(WIDTHS["digits_cnn"], channels=1)
    assert narrow(torch.zeros(2, 1, 28, 28)).shape == (2, 32)
    assert [width * 4 for width in WIDTHS["digits_cnn"]] == list(WIDTHS["mnist_cnn"])


def test_width_must_fit_the_groups():
    with pytest.raises(ValueError, match="num_groups"):
        digits_cnn((12, 32), channels=1)
