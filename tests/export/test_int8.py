import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qtdog.export.int8 import N_BINS, ActivationRange, best_activation_range, calibrate_activations


@example(-9.011009053521856e-42, 0.0)
@given(st.floats(-100, 0), st.floats(0, 100))
def test_zero_is_exactly_a_code(low, high):
    found = ActivationRange(low, high)
    assert 0 <= found.zero_point <= 255
    assert found.scale > 0


def test_a_flat_histogram_keeps_its_whole_range():
    found = best_activation_range(torch.ones(N_BINS), -1.0, 3.0)
    assert (found.low, found.high) == (-1.0, 3.0)


def test_the_best_range_beats_its_neighbours_on_the_values_themselves():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).double() ** 3
    low, high = float(values.min()), float(values.max())
    found = best_activation_range(torch.histc(values.float(), N_BINS, low, high), low, high)

    def error(bounds: ActivationRange) -> float:
        codes = (values / bounds.scale + bounds.zero_point).round().clamp(0, 255)
        return float(((codes - bounds.zero_point) * bounds.scale - values).square().mean())

    assert error(found) < 0.9 * error(ActivationRange(low, high))
    assert error(found) <= 1.05 * min(error(ActivationRange(low * k / 50, high * k / 50)) for k in range(1, 51))


def test_ranges_are_those_of_all_batches_and_hold_zero():
    images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    seen = []

    def read(part):
        seen.append(len(part))
        return [part.astype(np.float32) + 10, -part.astype(np.float32), np.zeros((len(part), 2), np.float32)]

    found = calibrate_activations(["up", "down", "nothing"], read, images)
    assert sum(seen[1:]) == 8  # two passes over all, after one image that tells the size
    assert found["up"].low == 0
    assert found["up"].high > 12
    assert found["down"].high == 0
    assert found["nothing"].scale > 0
