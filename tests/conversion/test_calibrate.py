import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers.std_conv import StdConv2d
from torch import nn

from qtdog.conversion import calibrate as calibrate_module
from qtdog.conversion.attach import attach, sites
from qtdog.conversion.calibrate import LayerCalibration, calibrate_
from qtdog.conversion.load import plain_state_dict
from qtdog.conversion.save import bake
from qtdog.core.errors import ConfigError, Interrupted, ModelError
from qtdog.quantizers.base import encode
from qtdog.quantizers.step_size_init import initial_scale

METHODS = ("rtn", "gptq", "obc")


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 16, 5), nn.ReLU(), nn.Linear(5, 2))
    return model.to(memory_format=torch.channels_last)


def errors_of(layer: LayerCalibration) -> tuple[float, float]:
    assert layer.error is not None
    assert layer.rounding_error is not None
    return layer.error, layer.rounding_error


def images(n: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(n, 3, 6, 6, generator=generator).cumsum(3).split(16))


def codes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.codes for name, value in bake(model).quantized.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_every_layer_gets_codes_that_bake_and_load(method, granularity):
    model = network()
    handle = attach(model, quantizer=method, bits=3, granularity=granularity, exclude=["7"])
    layers = calibrate_(model, method, images())
    assert [layer.name for layer in layers] == ["0", "3", "5"]
    assert {layer.method for layer in layers} == {method}
    assert handle.enabled
    assert handle.selectable
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    model.eval()
    plain = network(1).eval()
    plain.load_state_dict(plain_state_dict(bake(model)))
    assert torch.equal(plain(images()[0]), model(images()[0]))


@pytest.mark.parametrize("method", ["gptq", "obc"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_report_is_what_the_outputs_say_and_no_row_is_worse_than_rounded(method, bits):
    torch.manual_seed(bits)
    model: Any = nn.Sequential(nn.Linear(8, 60, bias=False))  # few columns: some rows cannot be repaired
    weight = model[0].weight.detach().clone()
    inputs = torch.randn(50, 8) @ torch.randn(8, 8)
    attach(model, quantizer=method, bits=bits)
    rounded = model[0].parametrizations.weight[0].rounded(weight).dequantize()
    (layer,) = calibrate_(model, method, [inputs])
    wanted = inputs.double() @ weight.double().T
    found, before = (inputs.double() @ (w.double() - weight.double()).T for w in (model[0].weight.detach(), rounded))
    expected = [(change.square().sum() / wanted.square().sum()).item() for change in (found, before)]
    assert errors_of(layer) == pytest.approx(expected, rel=1e-3)
    assert (found.square().sum(0) <= before.square().sum(0) * (1 + 1e-5)).all()
    assert expected[0] < 0.8 * expected[1]
    kept = (model[0].weight == rounded).all(dim=1).double().mean().item()
    assert layer.rounded_frac <= kept


def test_rtn_is_rounding_with_the_named_start():
    model = network()
    handle = attach(model, quantizer="rtn", bits=3, init="mse", exclude=["7"])
    (layer, *_) = calibrate_(model, "rtn")
    assert (layer.error, layer.rounding_error, layer.why) == (None, None, "")
    for site in sites(model):
        scale = initial_scale(site.weight, site.quantizer.spec, "mse")
        expected = encode(site.weight, scale, site.quantizer.spec)
        assert torch.equal(handle.layers[site.name](site.weight), expected.dequantize())


@pytest.mark.parametrize("method", ["gptq", "obc"])
def test_the_network_answers_more_like_itself_than_rounded(method):
    model, inputs = network().eval(), torch.cat(images())
    wanted = model(inputs)
    errors = {}
    for name in ("rtn", method):
        other = copy.deepcopy(model)
        attach(other, quantizer=name, bits=3, exclude=["7"])
        calibrate_(other, name, images())
        errors[name] = (other(inputs) - wanted).square().mean().item()
    assert errors[method] < 0.5 * errors["rtn"]


def test_several_passes_give_the_codes_of_one(monkeypatch):
    found, counts = [], []
    for most in (2**30, 6000):
        monkeypatch.setattr(calibrate_module, "HESSIAN_BYTES", most)
        model = network()
        attach(model, quantizer="obc", bits=3, exclude=["5"])
        calls: list[tuple[int, int]] = []
        calibrate_(model, "obc", images(), progress=lambda *count, calls=calls: calls.append(count))
        found.append(codes_of(model))
        counts.append(calls)
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("0.weight", "3.weight", "7.weight"))
    assert counts[0] == [(done, 4 + 3) for done in range(1, 8)]
    assert counts[1] == [(done, 2 * 4 + 3) for done in range(1, 12)]


def test_layers_that_cannot_be_calibrated_are_rounded_and_named(monkeypatch):
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    attach(model, quantizer="obc", bits=3)
    sizes = {"0": 1, "1": 4_200_000_000, "2": 1}
    monkeypatch.setattr(calibrate_module, "hessian_bytes", lambda model, site: sizes[site.name])
    monkeypatch.setattr(calibrate_module, "OBC_COLUMNS", 3)
    layers = {layer.name: layer for layer in calibrate_(model, "obc", images())}
    assert layers["0"].why == "its inputs were not seen"
    assert layers["1"].why == "its Hessian would take 4.2 GB"
    assert "4 weights per row; beyond 3 obc takes gptq's order" in layers["2"].why
    assert [layers[name].method for name in "012"] == ["rtn", "rtn", "gptq"]
    assert layers["0"].error is None


def test_a_standardized_convolution_is_repaired_in_its_outputs():
    """What counts there is the weight after standardization, which the method never sees."""
    torch.manual_seed(0)
    model = nn.Sequential(StdConv2d(3, 16, 3, padding=1)).eval()
    inputs = torch.randn(40, 3, 8, 8).cumsum(3).cumsum(2) + 3
    wanted, errors = model(inputs), {}
    for name in ("rtn", "obc"):
        other = copy.deepcopy(model)
        attach(other, quantizer=name, bits=4, init="mse")
        calibrate_(other, name, [inputs])
        errors[name] = (other(inputs) - wanted).square().mean().item()
    assert errors["obc"] < 0.5 * errors["rtn"]


def test_an_attention_block_is_quantized_whole():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, depth=1).eval()
    attach(model, quantizer="gptq", bits=3, exclude=["head"])
    layers = calibrate_(model, "gptq", [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))])
    assert {layer.method for layer in layers} == {"gptq"}
    for layer in layers:
        error, rounding_error = errors_of(layer)
        assert error < rounding_error


def test_layers_with_one_weight_are_one_problem():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    attach(model, quantizer="obc", bits=3)
    layers = calibrate_(model, "obc", [torch.randn(30, 6)])
    assert [layer.name for layer in layers] == ["0"]
    assert model[0].weight.unique().numel() <= 6 * 8
    assert torch.equal(model[0].weight, model[2].weight)


def test_the_model_keeps_its_mode_and_its_statistics():
    model = network().train()
    attach(model, quantizer="obc", bits=3)
    before = model[1].running_mean.clone()
    calibrate_(model, "obc", images())
    assert model.training
    assert torch.equal(model[1].running_mean, before)


def test_calibrating_again_starts_from_the_float_model():
    model = network()
    attach(model, quantizer="obc", bits=3)
    calibrate_(model, "obc", images())
    first = codes_of(model)
    calibrate_(model, "obc", images())
    assert all(torch.equal(codes, first[name]) for name, codes in codes_of(model).items())


@pytest.mark.parametrize("stop_at", [2, 6])
def test_a_stop_leaves_the_float_model(stop_at):
    model = network()
    handle = attach(model, quantizer="obc", bits=3)

    def stopping(done: int, total: int) -> None:
        if done == stop_at:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        calibrate_(model, "obc", images(), progress=stopping)
    assert not any(quantizer.enabled for quantizer in handle.layers.values())
    assert torch.equal(model[0].weight, network()[0].weight)


def test_what_cannot_work_is_refused():
    model = network()
    with pytest.raises(ConfigError, match="carries no quantizers"):
        calibrate_(model, "obc", images())
    attach(model, quantizer="obc")
    with pytest.raises(ConfigError, match="did you mean 'obc'"):
        calibrate_(model, "obq", images())
    with pytest.raises(ConfigError, match="learns from images"):
        calibrate_(model, "obc")
    with pytest.raises(ConfigError, match=r"layer '0': .*raise damping"):
        calibrate_(model, "gptq", [torch.ones(2, 3, 6, 6)], damping=1e-20)
    with pytest.raises(ModelError, match="inputs of layer '0' are not finite"):
        calibrate_(model, "obc", [torch.full((2, 3, 6, 6), torch.inf)])
    nn.init.constant_(model[5].parametrizations.weight.original, torch.nan)
    with pytest.raises(ModelError, match="weight of layer '5' is not finite"):
        calibrate_(model, "obc", images())
    trained = network()
    attach(trained, quantizer="lsq")
    with pytest.raises(ConfigError, match=r"carries LSQ: attach the model with quantizer='rtn'"):
        calibrate_(trained, "rtn")
