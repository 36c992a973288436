"""What holds for every quantizer: the row that a new one adds is its name in the registry."""

import pytest
import torch

from qtdog.conversion.attach import attach
from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import QuantizerOptions
from qtdog.quantizers.registry import QUANTIZERS, works_after_training

LAST_STEP = 0.999
OTHER = {"step_mode": "frozen", "init": "mse", "range": "symmetric", "rounding": "stochastic", "amplitude": 1.0}
OTHER |= {"stages": (1.0,), "calibration_images": 5, "damping": 0.5, "noise_width": 3.0}


def fresh(name: str, weight: torch.Tensor, **options):
    return QUANTIZERS[name].make(weight, QuantSpec(5), QuantizerOptions(**options))


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if not works_after_training(name)])
def test_weights_pass_until_enabled_and_then_evaluation_is_what_ships(name, weight):
    quantizer = fresh(name, weight)
    assert quantizer(weight) is weight
    assert not quantizer.selectable
    quantizer.enable_(weight)
    quantizer.begin_step_(weight, 0, LAST_STEP)
    assert quantizer.selectable
    evaluated = quantizer.eval()(weight)
    if quantizer.packs:
        value = quantizer.quantized(weight)
        assert torch.equal(evaluated, value.dequantize())
        assert value.spec.qmin <= value.codes.min() <= value.codes.max() <= value.spec.qmax
    else:
        assert torch.equal(evaluated, weight)
        with pytest.raises(RuntimeError, match="has no codes"):
            quantizer.quantized(weight)


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if not works_after_training(name)])
def test_names_of_the_state_never_change_and_a_copy_goes_on_alike(name, weight):
    """What `training.checkpoint.restore` does: a state dict, and the flag; then the same step."""
    quantizer, copy = fresh(name, weight), fresh(name, weight)
    names = quantizer.state_dict().keys()
    quantizer.enable_(weight)
    quantizer.begin_step_(weight, 7, 0.0)
    assert quantizer.state_dict().keys() == names
    copy.load_state_dict(quantizer.state_dict())
    copy.enabled = True
    other = weight.clone()
    for one, values in ((quantizer, weight), (copy, other)):
        one.begin_step_(values, 8, 0.6)
    assert torch.equal(quantizer(weight), copy(other))
    assert (quantizer.packs, quantizer.selectable) == (copy.packs, copy.selectable)


@pytest.mark.parametrize("name", list(QUANTIZERS))
@pytest.mark.parametrize("option", sorted(OTHER))
def test_an_option_that_a_quantizer_does_not_read_is_refused(name, option):
    model = torch.nn.Linear(4, 2)
    if option in QUANTIZERS[name].reads:
        attach(model, quantizer=name, **{option: OTHER[option]})
    else:
        with pytest.raises(ConfigError, match=f"'{name}' does not read '{option}'"):
            attach(model, quantizer=name, **{option: OTHER[option]})
