"""Each operation and each policy against torchvision's, one image after another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, autoaugment

from qtdog.core.errors import ConfigError
from qtdog.data.augment import augment, draw_parameters
from qtdog.data.augment_policies import (
    AUGMIX_BINS,
    N_BINS,
    NAMES,
    OPERATIONS,
    POLICIES,
    PolicyAugmentation,
    Space,
    apply_operations,
    augmix_space,
    crop_and_flip,
    rand_space,
    trivial_space,
)

THEIRS = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}
MAGNITUDES = {
    "posterize": (8.0, 5.0, 2.0, 1.0),
    "solarize": (255.0, 128.5, 17.0, 0.0),
    "translate_x": (-7.9, 3.2, 0.0, 11.0),
    "translate_y": (-7.9, 3.2, 0.0, 11.0),
    "rotate": (-135.0, 30.0, 4.5, 90.0),
}


def pictures(n: int, channels: int = 3, height: int = 19, width: int = 24) -> Tensor:
    """Noise, a ramp, one constant image, one of few values."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, height, width), generator=generator, dtype=torch.uint8)
    images[0] = torch.linspace(20, 210, width).to(torch.uint8)
    images[1] = 77
    images[2] = images[2] // 100 * 40
    return images


def torchvisions(image: Tensor, name: str, magnitude: float) -> Tensor:
    return autoaugment._apply_op(image, THEIRS[name], magnitude, InterpolationMode.NEAREST, None)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_torchvisions(name, channels):
    images = pictures(8, channels)
    magnitude = torch.tensor(MAGNITUDES.get(name, (-0.99, 0.35, 0.0, 0.9)) * 2)
    found = OPERATIONS[name](images, magnitude)
    for image, one, strength in zip(images, found, magnitude.tolist(), strict=True):
        expected = torchvisions(image, name, strength)
        differ = (one != expected).float().mean()
        if name in ("shear_x", "shear_y", "rotate"):  # a pixel half-way between two may fall to either
            assert differ < 0.02, differ
        elif name in ("sharpness", "contrast", "brightness", "color", "autocontrast"):
            assert (one.int() - expected.int()).abs().max() <= 1
            assert differ < 0.03
        else:
            assert torch.equal(one, expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "n_bins"),
    [
        (trivial_space(), autoaugment.TrivialAugmentWide()._augmentation_space(N_BINS), N_BINS),
        (rand_space(19, 24), autoaugment.RandAugment()._augmentation_space(N_BINS, (19, 24)), N_BINS),
        (
            augmix_space(19, 24),
            autoaugment.AugMix(all_ops=False)._augmentation_space(AUGMIX_BINS, (19, 24)),
            AUGMIX_BINS,
        ),
    ],
)
def test_a_space_is_torchvisions(ours: Space, theirs, n_bins):
    assert {THEIRS[name] for name in ours.operations} == set(theirs)
    for name, (magnitudes, signed) in ours.operations.items():
        values, has_sign = theirs[THEIRS[name]]
        torch.testing.assert_close(magnitudes, values.float().expand(n_bins))
        assert signed == has_sign


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_policy_is_a_loop_over_images_with_its_draws(name):
    images, n = pictures(12, height=20, width=20), 12
    made = PolicyAugmentation(name, {})
    draws = POLICIES[name].draw(torch.Generator().manual_seed(3), n, (20, 20), made.params)
    found = POLICIES[name].apply(images, draws)
    for row, image in enumerate(images):
        which, magnitude = draws["which"][row], draws["magnitude"][row]
        if name != "augmix":
            expected = image
            for number, strength in zip(which.tolist(), magnitude.tolist(), strict=True):
                expected = torchvisions(expected, NAMES[number], strength)
        else:
            clean = draws["clean"][row]
            mixed = clean * image
            for chain in range(3):
                changed = image
                for number, strength in zip(which[chain].tolist(), magnitude[chain].tolist(), strict=True):
                    changed = torchvisions(changed, NAMES[number], strength)
                mixed = mixed + (1 - clean) * draws["weights"][row, chain] * changed
            expected = mixed.to(torch.uint8)
        close = (found[row].int() - expected.int()).abs() <= 1
        assert close.float().mean() > 0.95, row


def test_draws_are_spread_as_published():
    generator, n = torch.Generator().manual_seed(0), 20_000
    trivial = POLICIES["trivialaugment"].draw(generator, n, (32, 32), {})
    counts = trivial["which"].flatten().bincount(minlength=len(NAMES)) / n
    assert counts.sub(1 / len(NAMES)).abs().max() < 0.01
    params = PolicyAugmentation("augmix", {}).params
    augmix = POLICIES["augmix"].draw(generator, n, (32, 32), params)
    assert augmix["clean"].mean() == pytest.approx(0.5, abs=0.01)  # Beta(1, 1)
    assert augmix["clean"].var() == pytest.approx(1 / 12, abs=0.005)
    torch.testing.assert_close(augmix["weights"].sum(1), torch.ones(n))
    assert augmix["weights"].var() == pytest.approx(1 / 18, abs=0.003)  # Dirichlet(1, 1, 1)
    longest = (augmix["which"] != NAMES.index("identity")).sum(2)
    assert all((longest == depth).float().mean() == pytest.approx(1 / 3, abs=0.02) for depth in (1, 2, 3))


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_part_of_a_batch_gets_what_the_whole_gets(name):
    images = pictures(6, height=16, width=16).permute(0, 2, 3, 1).contiguous()
    made, rows = PolicyAugmentation(name, {}), torch.tensor([1, 3, 5])
    whole = made(images, torch.arange(6), torch.Generator().manual_seed(1), n=6, size=16, n_views=2)
    part = made(images[rows], rows, torch.Generator().manual_seed(1), n=6, size=16, n_views=2)
    assert torch.equal(whole.clean[rows], part.clean)
    assert all(torch.equal(one[rows], other) for one, other in zip(whole.views, part.views, strict=True))
    assert not torch.equal(*whole.views)


def test_crops_are_those_of_domainbed():
    images = pictures(9, height=16, width=16).permute(0, 2, 3, 1).contiguous()
    parameters = draw_parameters(torch.Generator().manual_seed(0), 9, 16)
    parameters.factors[:] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    parameters.grey[:] = False
    expected = (augment(images, parameters) * 255).round().to(torch.uint8)
    assert (crop_and_flip(images, parameters, 16).int() - expected.int()).abs().max() <= 1


def test_images_may_have_sizes_of_their_own():
    images = [torch.zeros(20 + k, 30, 3, dtype=torch.uint8) for k in range(3)]
    sizes = torch.tensor([[20 + k, 30] for k in range(3)])
    made = PolicyAugmentation("trivialaugment", {})
    assert made(images, torch.arange(3), torch.Generator(), n=3, size=12, sizes=sizes).clean.shape == (3, 3, 12, 12)


def test_other_devices_get_the_same_operations():
    """The meta device has no values, but refuses what leaves it."""
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    which = torch.tensor([NAMES.index(name) for name in ("equalize", "rotate", "sharpness", "posterize")])
    assert apply_operations(images, which, torch.tensor([0.0, 5.0, 0.5, 4.0])).device == images.device


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("trivialaugment", {"magnitude": 3}, "has no hyper-parameter 'magnitude'"),
        ("randaugment", {"magnitude": 31}, "must lie in 0 … 30"),
        ("augmix", {"depth": 4}, "must lie in -1 … 3"),
    ],
)
def test_hyper_parameters_are_checked(name, params, text):
    with pytest.raises(ConfigError, match=text):
        PolicyAugmentation(name, params)


def test_angles_are_in_degrees():
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 0, 4] = 9
    turned = OPERATIONS["rotate"](image, torch.tensor([90.0]))
    assert turned[0, 0, 0, 0] == 9  # counterclockwise
    assert math.isclose(turned.float().sum().item(), 9)
