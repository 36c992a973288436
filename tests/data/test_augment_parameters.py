import torch

from qtdog.data.augment import AugmentParameters, draw_parameters

N, SIZE = 20_000, 96


def drawn(seed: int = 0, n: int = N) -> AugmentParameters:
    return draw_parameters(torch.Generator().manual_seed(seed), n, SIZE)


def test_crops_lie_inside_and_have_the_area_and_aspect_asked_for() -> None:
    top, left, height, width = drawn().crop.T
    assert torch.all((top >= 0) & (left >= 0) & (top + height <= SIZE) & (left + width <= SIZE))
    area, aspect = height * width / SIZE**2, width / height
    assert 0.69 < area.min() < 0.71
    assert area.max() > 0.98
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35
    assert (top == 0).float().mean() < 0.25  # placed anywhere, not only in a corner


def test_crops_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    theirs = RandomResizedCrop(SIZE, scale=(0.7, 1.0))
    image = torch.empty(3, SIZE, SIZE)
    params = [theirs.make_params([image]) for _ in range(4000)]
    expected = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in params]).double()
    ours = drawn().crop.double()
    spread = expected.std(dim=0) * (1 / 4000 + 1 / N) ** 0.5
    assert torch.all((ours.mean(dim=0) - expected.mean(dim=0)).abs() < 5 * spread)
    assert torch.allclose(ours.std(dim=0), expected.std(dim=0), rtol=0.06)


def test_factors_are_uniform_over_their_ranges() -> None:
    factors = drawn().factors
    low, high = torch.tensor([0.7, 0.7, 0.7, -0.3]), torch.tensor([1.3, 1.3, 1.3, 0.3])
    assert torch.all((factors >= low - 1e-6) & (factors <= high + 1e-6))
    assert torch.allclose(factors.mean(dim=0), (low + high) / 2, atol=0.01)
    assert torch.allclose(factors.std(dim=0), (high - low) / 12**0.5, atol=0.01)


def test_shares_of_flip_and_grey_and_all_orders() -> None:
    parameters = drawn()
    assert abs(parameters.flip.float().mean() - 0.5) < 0.02
    assert abs(parameters.grey.float().mean() - 0.1) < 0.02
    orders, counts = parameters.order.unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert torch.all((counts - N / 24).abs() < 6 * (N / 24) ** 0.5)


def test_the_draw_is_a_function_of_the_generator() -> None:
    first, second, other = drawn(0, 50), drawn(0, 50), drawn(1, 50)
    assert first.crop.equal(second.crop)
    assert first.factors.equal(second.factors)
    assert not first.factors.equal(other.factors)


def test_rows_can_be_taken() -> None:
    parameters = drawn(n=10)
    part = parameters.take(torch.tensor([7, 2]))
    assert len(part) == 2
    for name in ("crop", "flip", "factors", "order", "grey"):
        assert getattr(part, name).equal(getattr(parameters, name)[[7, 2]])
