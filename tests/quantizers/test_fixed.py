import copy

import pytest
import torch

from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.quantizers.base import QuantizerOptions, encode
from qtdog.quantizers.ptq import Fixed
from qtdog.quantizers.registry import QUANTIZERS
from qtdog.quantizers.step_size_init import initial_scale


@pytest.fixture
def weight() -> torch.Tensor:
    made = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    return made.to(memory_format=torch.channels_last)


def test_the_weight_passes_until_codes_are_set_and_then_counts_no_more(weight):
    fixed = Fixed(weight, QuantSpec(4))
    assert fixed(weight) is weight
    assert not fixed.packs
    assert not fixed.selectable
    with pytest.raises(RuntimeError, match="has no codes"):
        fixed.quantized(weight)
    value = encode(weight, torch.linspace(0.1, 0.6, 6), QuantSpec(4))
    fixed.set_(value)
    assert fixed.packs
    assert fixed.selectable
    for given in (weight, torch.zeros_like(weight)):
        result = fixed(given)
        assert torch.equal(result, value.dequantize())
        assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(fixed.quantized(weight).codes, value.codes)
    assert not list(fixed.parameters())


def test_state_and_flag_bring_the_codes_back(weight):
    fixed, other = Fixed(weight, QuantSpec(4)), Fixed(weight, QuantSpec(4))
    names = fixed.state_dict().keys()
    fixed.enable_(weight)
    assert fixed.state_dict().keys() == names
    other.load_state_dict(fixed.state_dict())
    other.enabled = True
    assert torch.equal(other(weight), fixed(weight))
    assert torch.equal(copy.deepcopy(fixed)(weight), fixed(weight))


@pytest.mark.parametrize("init", ["lsq", "lsq_plus", "minmax", "mse"])
@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rtn_rounds_to_nearest_with_the_named_start(weight, init, axis, bits):
    spec = QuantSpec(bits, axis)
    fixed = QUANTIZERS["rtn"].make(weight, spec, QuantizerOptions(init=init))
    fixed.enable_(weight)
    expected = encode(weight, initial_scale(weight, spec, init), spec)
    assert torch.equal(fixed(weight), expected.dequantize())


def test_the_symmetric_range_has_no_lowest_code(weight):
    fixed = Fixed(weight, QuantSpec(2), QuantizerOptions(range="symmetric"))
    fixed.enable_(weight)
    assert set(fixed.quantized(weight).codes.flatten().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("name", ["gptq", "obc"])
def test_what_learns_from_images_cannot_just_be_enabled(weight, name):
    with pytest.raises(ConfigError, match="calibrate_"):
        QUANTIZERS[name].make(weight, QuantSpec(4), QuantizerOptions()).enable_(weight)


@pytest.mark.parametrize(
    "value",
    [
        QuantizedTensor(torch.zeros(6, 4, 3, 1, dtype=torch.int8), torch.ones(6), QuantSpec(4)),
        QuantizedTensor(torch.zeros(6, 4, 3, 3, dtype=torch.int8), torch.ones(1), QuantSpec(4)),
        QuantizedTensor(torch.zeros(6, 4, 3, 3, dtype=torch.int8), torch.ones(6), QuantSpec(5)),
    ],
)
def test_codes_of_another_shape_or_grid_are_refused(weight, value):
    fixed = Fixed(weight, QuantSpec(4))
    with pytest.raises(ValueError, match="expected"):
        fixed.set_(value)
    assert not fixed.enabled
