"""Activations on a grid: the grid against torch's, its gradient and start, and runs that train with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qtdog.conversion.attach import activation_grids, attach, input_layers
from qtdog.core.errors import ConfigError, FormatError, Interrupted
from qtdog.core.progress import StopAfter
from qtdog.packing.packed_file import load_packed, save_packed
from qtdog.quantizers.activations import MOMENTUM, ActivationGrid, ActivationQuantizer, quantize_inputs_
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.load_model import load_model
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_a_grid_is_torchs_fake_quantization(bits, signed):
    values = 3 * torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(bits))
    grid = ActivationGrid(bits, signed, 0.125)
    expected = torch.fake_quantize_per_tensor_affine(values, 0.125, 0, grid.qmin, grid.qmax)
    assert torch.equal(grid(values), expected)


@pytest.mark.parametrize("mode", ["learned", "moving"])
@pytest.mark.parametrize("signed", [False, True])
def test_training_computes_what_the_grid_says(mode, signed):
    torch.manual_seed(0)
    quantizer = ActivationQuantizer(6, mode)
    values = torch.randn(50, 7) if signed else torch.rand(50, 7)
    assert torch.equal(quantizer.eval()(values), values)  # no grid yet
    first = quantizer.train()(values)
    assert quantizer.is_signed == signed
    assert torch.equal(first, quantizer.grid()(values))
    assert torch.equal(quantizer.eval()(3 * values), quantizer.grid()(3 * values))


def test_a_learned_step_has_lsqs_start_and_gradient():
    torch.manual_seed(0)
    quantizer, values = ActivationQuantizer(3, "learned"), torch.rand(400).requires_grad_()
    quantizer(values)
    start = 2 * values.detach().mean() / 7**0.5
    torch.testing.assert_close(quantizer.scale(), start[None])
    with torch.no_grad():
        quantizer.log_scale.copy_(torch.tensor([0.1]).log())  # a part is clipped
    quantizer(values).sum().backward()
    ratio = values.detach() / quantizer.scale().detach()
    by_scale = torch.where(ratio < 7, ratio.round() - ratio, torch.tensor(7.0)).sum()
    torch.testing.assert_close(quantizer.log_scale.grad, (by_scale * 0.1)[None], rtol=1e-4, atol=1e-5)
    assert values.grad is not None
    assert torch.equal(values.grad, (ratio < 7).float())


def test_a_moving_range_follows_the_largest_values():
    quantizer, expected = ActivationQuantizer(8, "moving"), 2.0
    quantizer(torch.tensor([0.0, 2.0]))
    for largest in (3.0, 1.0, 5.0):
        quantizer(torch.tensor([0.0, largest]))
        expected = MOMENTUM * expected + (1 - MOMENTUM) * largest
    assert quantizer.grid().scale == pytest.approx(expected / 255)
    quantizer.eval()(torch.tensor([90.0]))
    assert quantizer.grid().scale == pytest.approx(expected / 255)


def test_a_copy_of_a_network_uses_its_own_grids():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    handle = attach(network, bits=4)
    for module in input_layers(network).values():
        quantize_inputs_(module, 8, "moving")
    assert activation_grids(network) == {}
    network(torch.randn(5, 3))
    assert activation_grids(network) == {}  # not before the weights are on a grid
    handle.enable()
    network(torch.randn(5, 3))
    grids = activation_grids(network)
    assert [grid.signed for grid in grids.values()] == [True, False]
    other = copy.deepcopy(network)
    other(100 * torch.randn(5, 3))
    assert activation_grids(network) == grids
    assert activation_grids(other) != grids


@pytest.mark.parametrize(
    ("bits", "activations", "mode", "averager"),
    [(7, 8, "learned", "none"), (6, 6, "moving", "sma"), (6, 6, "learned", "sma")],
)
def test_a_run_resumes_bit_for_bit_and_its_file_answers_alike(
    short_config, three_digits, tmp_path, bits, activations, mode, averager
):
    quantizer = {"bits": bits, "activation_bits": activations, "activation_range": mode, "start_step": 1}
    params = {"start": 2} if averager == "sma" else {}
    data = {"target": "75", "batch_size": 4, "image_size": 12}
    config = resolve(
        short_config(
            data=data,
            quantizer=quantizer,
            averager={"name": averager, "params": params},
            train={"steps": 5, "eval_every": 2, "checkpoint_every": 1},
        ),
        three_digits,
    )
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    expected = run(config, three_digits, whole)  # ends with a comparison of the file and the training-time network
    info = load_model(whole.model_file).info
    assert {note.bits for note in info.activations.values()} == {activations}
    assert len(info.activations) == len(load_packed(whole.model_file).quantized)
    for stop in (1, 3):
        with pytest.raises(Interrupted):
            run(config, three_digits, broken, callbacks=RunCallbacks(StopAfter(stop)), resume=stop > 1)
    assert run(config, three_digits, broken, resume=True)["model_sha256"] == expected["model_sha256"]
    network = build_components(config, three_digits).network
    assert any("activation.started" in name for name in network.state_dict())
    packed = load_packed(whole.model_file)
    grids = {"nowhere": {"bits": 8, "signed": False, "scale": 0.1}}
    save_packed(tmp_path / "other.safetensors", packed.quantized, packed.rest, packed.metadata | {"activations": grids})
    with pytest.raises(FormatError, match="'nowhere', which is no layer"):
        load_model(tmp_path / "other.safetensors")


def test_float_activations_leave_no_trace(short_config, digits):
    network = build_components(resolve(short_config(), digits), digits).network
    assert not any("activation" in name for name in network.state_dict())
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("quantizer", "text"),
    [({"activation_bits": 1}, "must be 0"), ({"name": "rtn", "activation_bits": 8}, "rounds no activations")],
)
def test_what_cannot_be_is_refused(short_config, quantizer, text):
    with pytest.raises(ConfigError, match=text):
        short_config(quantizer=quantizer)
