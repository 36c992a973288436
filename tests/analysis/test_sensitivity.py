import pytest
import torch
from torch import nn

from qtdog.analysis.hessian import BlockTrace, mean_losses
from qtdog.analysis.mixed_precision import Sensitivity, layer_costs, require_grid, rounding_error, sensitivities
from qtdog.conversion.attach import attach, sites
from qtdog.conversion.layers import find_layers
from qtdog.core.config import AFTER_TRAINING, QuantizerConfig
from qtdog.core.errors import ConfigError
from qtdog.quantizers.registry import QUANTIZERS

GRIDLESS = ("freeze", "noise-accumulated", "noise-fresh", "noise-matched")
DURING = [name for name in QUANTIZERS if name not in AFTER_TRAINING]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.classifier = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.features(images)))


@pytest.mark.parametrize("granularity", ["channel", "layer"])
@pytest.mark.parametrize("options", [{}, {"init": "minmax"}, {"init": "mse", "range": "symmetric"}])
def test_rounding_error_is_what_the_attached_quantizer_makes(granularity, options):
    model = Two()
    config = QuantizerConfig(granularity=granularity, **options)
    expected = rounding_error(find_layers(model)[0], config, 4)
    before = model.features.weight.detach().clone()
    attach(model, bits=4, granularity=granularity, include=["features"], **options).enable()
    (site,) = sites(model)
    assert expected == pytest.approx((site.quantizer(site.weight) - before).square().sum().item())
    assert torch.equal(site.weight, before)


@pytest.mark.parametrize("name", [name for name in DURING if name not in GRIDLESS])
def test_every_grid_has_an_error_that_fewer_bits_do_not_lessen(name):
    layer = find_layers(Two())[0]
    errors = [rounding_error(layer, QuantizerConfig(name=name), bits) for bits in (8, 6, 4)]
    assert 0 < errors[0] <= errors[1] <= errors[2]
    require_grid(QuantizerConfig(name=name))


@pytest.mark.parametrize("name", [*GRIDLESS, "none"])
def test_without_a_grid_there_are_no_bits_to_choose(name):
    with pytest.raises(ConfigError, match=f"'{name}' leaves the weights in float"):
        require_grid(QuantizerConfig(name=name))


def test_cost_is_mean_curvature_times_squared_error_for_the_layers_that_are_quantized():
    model, images, labels = Two(), torch.randn(30, 6), torch.arange(30) % 3
    losses = mean_losses(model, [(images, labels)], 30)
    (found,) = sensitivities(model, losses, QuantizerConfig(), [8, 3], n_vectors=200)
    assert found.names == ("features",)
    exact = torch.autograd.functional.hessian(
        lambda w: nn.functional.cross_entropy(
            torch.func.functional_call(model, {"features.weight": w.reshape(8, 6)}, (images,)), labels
        ),
        model.features.weight.detach().flatten(),
    )
    assert isinstance(exact, torch.Tensor)
    assert abs(found.curvature.trace - exact.trace().item()) < 4 * found.curvature.standard_error
    assert found.costs == [found.curvature.mean * error for error in found.errors]
    assert layer_costs([found]).tolist() == [found.costs]


def test_negative_curvature_costs_nothing():
    model = nn.Sequential(nn.Linear(2, 2))
    losses = [(-(model[0].get_parameter("weight") ** 2).sum(), 1.0)]
    (found,) = sensitivities(model, losses, QuantizerConfig(exclude=()), [4], n_vectors=2)
    assert found.curvature.mean == -2
    assert found.costs == [0.0]


@pytest.mark.parametrize(("trace", "counted"), [(5.0, 0.5), (1.0, 0.2), (-9.0, 0.2)])
def test_curvature_within_its_error_counts_as_that_error(trace, counted):
    layer = Sensitivity(("a",), BlockTrace(trace, 2.0, 10), (3.0, 1.0))
    assert layer.costs == [counted * 3, counted]


def test_layers_that_share_a_weight_are_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].get_parameter("weight")
    losses = [((model[0].get_parameter("weight") ** 2).sum(), 1.0)]
    (found,) = sensitivities(model, losses, QuantizerConfig(exclude=()), [4], n_vectors=2)
    assert found.names == ("0", "1")
    assert found.curvature.n_weights == 16
