import numpy as np
import pytest
import torch

from qtdog.core.feature_maps import EPS, Stage, Style, restyle, style

LAYOUTS = [
    (Stage("a", 5, axis=1, ndim=4), (3, 5, 4, 2), (2, 3)),
    (Stage("a", 5, axis=3, ndim=4), (3, 4, 2, 5), (1, 2)),
    (Stage("a", 5, axis=2, ndim=3), (3, 8, 5), (1,)),
    (Stage("a", 5, axis=1, ndim=3), (3, 5, 8), (2,)),
]


@pytest.mark.parametrize(("stage", "shape", "positions"), LAYOUTS)
def test_a_stage_knows_the_layout_of_its_map(stage, shape, positions):
    assert stage.positions == positions
    features = torch.randn(shape)
    values = torch.arange(5.0)
    found = (features * 0 + stage.spread(values)).movedim(stage.axis, -1)
    assert torch.equal(found, values.expand(found.shape))


@pytest.mark.parametrize(("stage", "shape", "positions"), LAYOUTS)
def test_style_is_mean_and_population_deviation(stage, shape, positions):
    features = 3 + 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = style(features, stage.positions)
    array = features.numpy()
    np.testing.assert_allclose(found.mean.numpy(), array.mean(positions, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(found.std.numpy(), np.sqrt(array.var(positions, keepdims=True) + EPS), rtol=1e-12)


@pytest.mark.parametrize(("stage", "shape", "positions"), LAYOUTS)
def test_restyled_features_have_the_new_style(stage, shape, positions):
    features = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    old = style(features, stage.positions)
    new = Style(old.mean - 7, old.std * 3)
    found = style(restyle(features, old, new), stage.positions)
    torch.testing.assert_close(found.mean, new.mean)
    torch.testing.assert_close(found.std, new.std, rtol=1e-4, atol=0)  # EPS is in it once, not three times


def test_its_own_style_changes_nothing_at_all():
    features = torch.randn(2, 3, 4, 4)
    own = style(features, (2, 3))
    assert torch.equal(restyle(features, own, own), features)


def test_a_single_position_and_a_constant_channel_stay_finite():
    features = torch.ones(2, 3, 1, 1, requires_grad=True)
    own = style(features, (2, 3))
    restyled = restyle(features, own, Style(own.mean + 1, own.std * 5))
    restyled.sum().backward()
    torch.testing.assert_close(restyled, torch.full((2, 3, 1, 1), 2.0))
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_half_precision_is_measured_in_float32_and_given_back():
    features = (1000 + torch.randn(2, 3, 8, 8)).bfloat16()
    own = style(features, (2, 3))
    assert own.mean.dtype == torch.float32
    torch.testing.assert_close(own, style(features.float(), (2, 3)))
    assert restyle(features, own, own).dtype == torch.bfloat16
