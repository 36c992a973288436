import resource

import pytest
import timm
import torch
from torch import nn

from qtdog.conversion.attach import attach
from qtdog.conversion.load import load_into
from qtdog.conversion.save import save
from qtdog.core.errors import ModelError
from qtdog.packing.packed_file import load_packed, save_packed
from qtdog.packing.sizes import file_sizes


def test_lite0_at_seven_bits_is_six_times_smaller_and_answers_the_same(tmp_path):
    model = timm.create_model("tf_efficientnet_lite0", num_classes=7)
    attach(model, bits=7, exclude=["classifier"]).enable()
    save(model, tmp_path / "m", metadata={"classes": ["x"] * 7})
    sizes = file_sizes(tmp_path / "m")
    assert sizes.ratio >= 6.0
    assert sizes.bits_per_code <= 1.02 * sizes.entropy_bits_per_code
    assert sizes.over_entropy <= 1.02
    x = torch.randn(2, 3, 64, 64)
    fresh = load_into(tmp_path / "m", timm.create_model("tf_efficientnet_lite0", num_classes=7))
    assert not fresh.training
    with torch.no_grad():
        assert torch.equal(fresh(x), model.eval()(x))


def test_wrong_models_are_told_what_differs_and_left_alone(tmp_path):
    save(nn.Linear(3, 2), tmp_path / "m")
    other = nn.Linear(3, 4)
    before = other.weight.detach().clone()
    with pytest.raises(ModelError, match=r"'weight' should have shape \(4, 3\), the file has \(2, 3\)"):
        load_into(tmp_path / "m", other)
    assert torch.equal(other.weight, before)
    with pytest.raises(ModelError, match="'bias' is not in the model"):
        load_into(tmp_path / "m", nn.Linear(3, 2, bias=False))


def test_diverged_weights_are_not_shipped(tmp_path):
    model = nn.Linear(3, 2)
    attach(model).enable()
    with torch.no_grad():
        model.get_parameter("parametrizations.weight.original").fill_(float("inf"))
    with pytest.raises(ModelError, match="diverged"):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_weight_of_a_thousand_names_is_refused_before_it_takes_memory(tmp_path):
    model = nn.Linear(4000, 500)
    attach(model).enable()
    save(model, tmp_path / "m")
    packed = load_packed(tmp_path / "m")
    weight = packed.quantized["weight"]
    names = {f"copy{index}": weight for index in range(1000)}  # 8 GB once dequantized
    save_packed(tmp_path / "m", packed.quantized | names, packed.rest, {})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="is not in the model"):
        load_into(tmp_path / "m", nn.Linear(4000, 500))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
