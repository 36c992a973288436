# pyright: reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from qtdog.conversion.attach import attach
from qtdog.conversion.layers import coverage, find_layers
from qtdog.core.errors import ConfigError


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x):
        return x @ self.weight


def test_an_in_out_linear_layer_has_one_step_per_output():
    layer = Conv1D(5, 3)
    handle = attach(layer, bits=4)
    assert handle.layers["weight"].step_sizes().shape == (5,)
    with torch.no_grad():
        layer.parametrizations.weight.original[:, 0] *= 100
    handle.enable()
    steps = handle.layers["weight"].step_sizes()
    assert steps[0] > 10 * steps[1:].max()


@pytest.mark.parametrize(("groups", "out"), [(1, 16), (2, 16), (4, 32), (16, 16), (16, 32)])
def test_grouped_transposed_convolutions_have_one_step_per_output_channel(groups, out, tmp_path):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(16, out, 3, groups=groups, bias=False)
    with torch.no_grad():  # output channel number c is 2^c wide
        weight = layer.weight.unflatten(0, (groups, -1))
        weight *= torch.exp2(torch.arange(out).float() / 4).reshape(groups, 1, -1, 1, 1)
    handle = attach(layer, bits=8)
    handle.enable()
    steps = handle.layers["weight"].step_sizes()
    assert steps.shape == (out,)
    ratio = steps[1:] / steps[:-1]
    assert 0.2 < ratio.min() < ratio.max() < 5
    x = torch.randn(2, 16, 4, 4)
    exact = torch.nn.functional.conv_transpose2d(x, handle.weights_()["weight"], groups=groups)
    error = (layer(x) - exact).flatten(2).norm(dim=2).mean(0) / exact.flatten(2).norm(dim=2).mean(0)
    assert error.max() < 0.1


@pytest.mark.parametrize("norm", [nn.LayerNorm([3, 4, 4]), nn.RMSNorm([4, 4]), nn.BatchNorm2d(3)])
def test_norm_layers_are_no_layers(norm):
    assert [layer.name for layer in find_layers(nn.Sequential(norm, nn.Linear(4, 4)))] == ["1"]


def pruned():
    return prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(nn.Linear(8, 8))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(8, 8))


LEFT = {
    "_WeightNorm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "_SpectralNorm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "_Orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "pruned": pruned,
    "weight_norm": old_weight_norm,
    "scripted": scripted,
}


@pytest.mark.parametrize("reason", LEFT)
def test_layers_left_in_float_are_named_with_their_share(reason):
    model = nn.ModuleDict({"body": LEFT[reason](), "head": nn.Linear(8, 8, bias=False)})
    with pytest.warns(UserWarning, match=rf"'body' \(.*{reason}.*, \d+\.\d% of the parameters\)"):
        handle = attach(model, bits=4)
    assert [(left.name, left.n_weights) for left in handle.coverage.left] == [("body", 64)]
    total = handle.coverage.n_parameters
    assert handle.coverage.quantized_frac == 64 / total


def test_what_the_patterns_leave_out_is_no_problem_but_is_counted():
    model = nn.ModuleDict({"body": LEFT["_WeightNorm"](), "head": nn.Linear(8, 8), "tail": nn.Linear(8, 8)})
    handle = attach(model, exclude=["body", "tail"])
    assert [(left.name, left.reason) for left in handle.coverage.left] == [
        ("body", "parametrized by _WeightNorm"),
        ("tail", "not selected"),
    ]


def test_large_parameters_that_are_no_layers_are_named():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 8))

    with pytest.warns(UserWarning, match="'experts.gate_up_proj' \\(no layer's weight"):
        attach(nn.ModuleDict({"experts": Experts(), "head": nn.Linear(8, 8)}))


def test_coverage_of_a_plain_model_counts_a_shared_weight_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    found = coverage(model, [layer.weight for layer in find_layers(model)])
    assert (found.n_parameters, found.n_quantized, found.left) == (16, 16, ())


def test_a_pattern_may_name_what_cannot_be_quantized():
    model = nn.ModuleDict({"body": pruned(), "head": nn.Linear(8, 8)})
    attach(model, exclude=["body"])
    with pytest.raises(ConfigError, match="unknown layer pattern 'bodies'"):
        attach(nn.ModuleDict({"body": pruned(), "head": nn.Linear(8, 8)}), exclude=["bodies"])


def test_kinds_of_layers_stand_where_patterns_stand():
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Flatten())

    assert list(attach(network(), exclude=["depthwise"]).layers) == ["0", "2"]
    assert list(attach(network(), include=["pointwise"]).layers) == ["2"]
    made = attach(network(), bits=4, layer_bits={"depthwise": 8}).layers
    assert {name: quantizer.spec.bits for name, quantizer in made.items()} == {"0": 4, "1": 8, "2": 4}
    assert list(attach(nn.Linear(3, 2), layer_bits={"depthwise": 8}, exclude=["pointwise"]).layers) == ["weight"]
    with pytest.raises(ConfigError, match="did you mean 'depthwise'"):
        attach(network(), exclude=["depthwize"])
