"""Surfaces of known functions, and networks that are put back."""

import pytest
import torch
from torch import nn

from qtdog.analysis.loss_surface import Plane, SurfacePlan, across, between, same_statistics
from qtdog.core.errors import ConfigError, ModelError
from qtdog.training.evaluation import estimate_statistics_


def line(*weights: float) -> nn.Linear:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([weights]))
    return layer


def test_a_line_between_two_networks_is_the_known_parabola():
    start, end = line(1.0, 0.0), line(0.0, 2.0)
    with Plane(start, [between(start, end)]) as plane:
        for t in (-0.5, 0.0, 0.25, 1.0, 1.5):
            plane.to_(t)
            assert start.weight.square().sum().item() == pytest.approx((1 - t) ** 2 + 4 * t**2, abs=1e-6)
    assert start.weight.tolist() == [[1.0, 0.0]]


def test_a_plane_is_spanned_by_both_axes():
    start, end = line(3.0, 0.0), line(3.0, 4.0)
    along = between(start, end)
    second = across(along, [start.weight.detach()], 0, 0)
    assert abs(second[0][0, 0].item()) == pytest.approx(4, abs=1e-5)
    assert second[0][0, 1].item() == pytest.approx(0, abs=1e-5)
    with Plane(start, [along, second]) as plane:
        plane.to_(0.5, 0.5)
        assert start.weight[0, 1].item() == pytest.approx(2, abs=1e-5)
        assert abs(start.weight[0, 0].item() - 3) == pytest.approx(2, abs=1e-5)


def test_moving_statistics_are_measured_anew_and_put_back():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(50, 2) + 5
    axis = [parameter.detach().clone() for parameter in network.parameters()]
    with Plane(network, [axis], lambda: estimate_statistics_(network, [images])) as plane:
        plane.to_(1.0)
        assert torch.allclose(network[1].get_buffer("running_mean"), network[0](images).mean(0), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_statistics_are_compared():
    one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    assert same_statistics([one, other])
    assert other.running_mean is not None
    other.running_mean += 1
    assert not same_statistics([one, other])


def test_networks_of_different_shapes_have_no_line():
    with pytest.raises(ModelError, match="one backbone"):
        between(nn.Linear(2, 2), nn.Linear(2, 3))


def test_a_plan_without_a_middle_is_refused():
    with pytest.raises(ConfigError, match="--num-points"):
        SurfacePlan(n_points=2)
