import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qtdog.analysis.flatness import (
    Flatness,
    filter_direction,
    local_flatness,
    random_direction,
    summarize_rises,
    weight_norm,
)
from qtdog.conversion.attach import attach
from qtdog.core.errors import ModelError


class Bowl(nn.Module):
    """E(w) = ½ wᵀ H w + gᵀ w with a known H of two blocks, at w = (1, -1, …): F_γ = γ² tr H / 2n exactly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        root = torch.randn(12, 12, dtype=torch.float64)
        self.hessian = root @ root.T / 4
        self.first = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
        self.second = nn.Parameter(-torch.ones(6, dtype=torch.float64))

    def loss(self) -> float:
        w = torch.cat([self.first.flatten(), self.second])
        return (w @ self.hessian @ w / 2 + w.sum()).item()

    def expected(self, gamma: float) -> float:
        return gamma**2 * self.hessian.trace().item() / 24


def deviation(found: Flatness, expected: float) -> float:
    return (found.increase - expected) / found.standard_error


def test_a_quadratic_is_met_within_the_error_bars():
    bowl = Bowl()
    scores = [
        [deviation(found, bowl.expected(gamma)) for gamma, found in zip((0.5, 8.0), estimates, strict=True)]
        for estimates in (local_flatness(bowl, bowl.loss, [0.5, 8.0], seed=seed) for seed in range(40))
    ]
    table = torch.tensor(scores)
    assert table.abs().max() < 4
    assert (
        (table.square().mean(0) > 0.5) & (table.square().mean(0) < 1.7)
    ).all()  # the bars are neither wide nor short
    assert (table.mean(0).abs() < 3 / math.sqrt(40)).all()


def test_radius_zero_changes_nothing_and_the_network_is_put_back():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    weight = network[0].get_parameter("weight")
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels = torch.randn(5, 3, 3, 3), torch.tensor([0, 1, 0, 1, 1])

    def loss() -> float:
        return nn.functional.cross_entropy(network(images), labels).item()

    (still, moved) = local_flatness(network, loss, [0.0, 3.0], n_directions=4)
    assert (still.increase, still.standard_error) == (0.0, 0.0)
    assert moved.increase != 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_it_is_put_back_after_an_error():
    bowl = Bowl()
    answers = iter([0.0, 1.0])
    with pytest.raises(StopIteration):
        local_flatness(bowl, lambda: next(answers), [1.0], n_directions=4)
    assert torch.equal(bowl.first, torch.ones(2, 3, dtype=torch.float64))


def test_every_radius_uses_the_same_directions_and_a_seed_gives_the_same_numbers():
    bowl = Bowl()
    bowl.first.data.zero_()
    bowl.second.data.zero_()
    zero_gradient = lambda: bowl.loss() - sum(p.sum().item() for p in bowl.parameters())  # noqa: E731
    one, two = local_flatness(bowl, zero_gradient, [1.0, 2.0], n_directions=7, seed=5)
    assert two.increase == pytest.approx(4 * one.increase)
    assert local_flatness(bowl, zero_gradient, [1.0], n_directions=7, seed=5) == [one]
    assert local_flatness(bowl, zero_gradient, [1.0], n_directions=7, seed=6) != [one]


def test_directions_are_one_gaussian_over_all_parameters_joined():
    shapes = [torch.zeros(40, 50), torch.zeros(1)]
    shares = []
    for n in range(50):
        large, small = random_direction(shapes, 0, n)
        assert large.square().sum() + small.square().sum() == pytest.approx(1, abs=1e-5)
        shares.append(small.square().item())
    assert sum(shares) / 50 == pytest.approx(1 / 2001, rel=0.8)  # each weight has its share, not each tensor


def test_latent_weights_are_refused():
    network = nn.Linear(4, 4)
    attach(network)
    with pytest.raises(ModelError, match="plain weights"):
        local_flatness(network, lambda: 0.0, [1.0])
    with pytest.raises(ValueError, match="at least 2"):
        local_flatness(nn.Linear(2, 2), lambda: 0.0, [1.0], n_directions=1)


def test_weight_norm_joins_all_parameters():
    network = nn.Linear(3, 2)
    joined = torch.cat([p.detach().flatten() for p in network.parameters()])
    assert weight_norm(network) == pytest.approx(joined.norm().item())


def test_opposite_directions_cancel_the_slope_and_their_error_is_that_of_pairs():
    bowl = Bowl()
    (plain,) = local_flatness(bowl, bowl.loss, [0.5], n_directions=40)
    (paired,) = local_flatness(bowl, bowl.loss, [0.5], n_directions=40, antithetic=True)
    assert paired.standard_error < plain.standard_error / 3
    assert abs(paired.increase - bowl.expected(0.5)) < 4 * paired.standard_error
    increases = torch.tensor([[5.0], [-1.0], [4.0], [2.0]])
    assert summarize_rises([1.0], increases, antithetic=True)[0].standard_error == pytest.approx(0.5)


@pytest.mark.parametrize("n", [2, 5])
def test_pairs_need_two_of_them_and_an_even_number(n: int):
    with pytest.raises(ValueError, match="even and at least 4"):
        local_flatness(nn.Linear(2, 2), lambda: 0.0, [1.0], n_directions=n, antithetic=True)


def test_a_filter_radius_does_not_see_the_scale_of_the_weights():
    torch.manual_seed(0)
    network, images = nn.Linear(6, 3), torch.randn(20, 6)
    network.bias.data.zero_()

    def loss(scale: float) -> Callable[[], float]:  # the same function of the input whatever the scale of the weights
        return lambda: nn.functional.cross_entropy(network(images) / scale, torch.zeros(20, dtype=torch.long)).item()

    small = local_flatness(network, loss(1.0), [0.3], n_directions=8, radius="filter")
    absolute = local_flatness(network, loss(1.0), [0.3], n_directions=8)
    network.weight.data.mul_(10)
    large = local_flatness(network, loss(10.0), [0.3], n_directions=8, radius="filter")
    assert large[0].increase == pytest.approx(small[0].increase, rel=1e-4)
    assert local_flatness(network, loss(10.0), [0.3], n_directions=8)[0].increase < absolute[0].increase / 5


def test_a_filter_direction_has_the_lengths_of_the_filters_and_leaves_biases():
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, 2, 2), torch.randn(4)]
    kernel, bias = filter_direction(weights, 0, 0)
    assert torch.allclose(kernel.flatten(1).norm(dim=1), weights[0].flatten(1).norm(dim=1))
    assert bias.abs().sum() == 0
