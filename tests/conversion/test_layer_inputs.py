"""The Hessians against what the layers themselves compute: with weights D, ‖outputs‖² = tr(D H Dᵀ) / 2."""

from functools import partial

import pytest
import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import StdConv2d
from torch import nn

from qtdog.conversion import calibrate as layer_inputs_module
from qtdog.conversion.attach import attach, sites
from qtdog.conversion.calibrate import HessianRecorder
from qtdog.quantizers.ptq import row_errors

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (7, 6)),
    "linear over two leading dimensions": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "linear of one vector": (lambda: nn.Linear(6, 4), (6,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 9)),
    "one image without a batch": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 8, 9)),
    "stride, padding, dilation": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
        (2, 3, 9, 8),
    ),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), (2, 4, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(5, 5, 3, groups=5, padding=1), (2, 5, 6, 6)),
    "depthwise, two outputs per channel": (lambda: nn.Conv2d(3, 6, 5, groups=3), (2, 3, 7, 7)),
    "padding same, even kernel": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (2, 2, 9, 9)),
    "padding valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 2, 5, 5)),
    "reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (3, 1, 2), groups=2, stride=(2, 1, 1), padding=(1, 0, 1)), (2, 2, 5, 4, 5)),
    "timm's own padding": (lambda: Conv2dSame(2, 3, 3, stride=2), (2, 2, 8, 7)),
    "channels last": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
}


def recorded(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    attach(model, quantizer="obc")
    with torch.no_grad(), HessianRecorder(model, sites(model)) as recorder:
        model(inputs)
    return recorder.hessians


def check_hessian(layer: nn.Module, inputs: torch.Tensor, hessian: torch.Tensor) -> None:
    """Compare with the outputs of a plain copy of `layer` for weights drawn at random, row by row."""
    weight = layer.get_parameter("weight")
    rows = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight.copy_(rows)
        if getattr(layer, "bias", None) is not None:
            layer.get_parameter("bias").zero_()
        outputs = layer(inputs).double()
    channel = -1 if weight.ndim == 2 else inputs.ndim - weight.ndim + 1
    expected = outputs.square().movedim(channel, 0).reshape(len(rows), -1).sum(1)
    close = {"rtol": 2e-5, "atol": 1e-5 * expected.mean().item()}  # outputs and products are in float32
    torch.testing.assert_close(row_errors(rows.flatten(1), hessian) / 2, expected, **close)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch's own
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("patch_bytes", [1, 2**26])
def test_the_hessian_is_that_of_what_the_layer_multiplies(name, patch_bytes, monkeypatch):
    monkeypatch.setattr(layer_inputs_module, "PATCH_BYTES", patch_bytes)
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    inputs = torch.randn(shape)
    if name == "channels last":
        inputs = inputs.to(memory_format=torch.channels_last)
    (hessian,) = recorded(nn.Sequential(make()), inputs).values()
    assert hessian.dtype == torch.float64
    check_hessian(make(), inputs, hessian)


def test_explicit_patches_give_the_same_hessian():
    inputs = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    (hessian,) = recorded(nn.Sequential(nn.Conv2d(4, 2, 3, groups=2, stride=2, padding=1)), inputs).values()
    unfolded = nn.functional.unfold(inputs.double(), 3, padding=1, stride=2).reshape(2, 2, 18, -1)
    columns = unfolded.permute(1, 2, 0, 3).flatten(2)
    torch.testing.assert_close(hessian, 2 * columns @ columns.mT, rtol=1e-5, atol=1e-5)


def test_every_layer_of_efficientnet_lite0():
    model = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}

    def remember(name: str, module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        seen[name] = arguments[0].detach().clone()

    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    for name, module in layers.items():
        module.register_forward_pre_hook(partial(remember, name))
    hessians = recorded(model, inputs)
    assert hessians.keys() == layers.keys()
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()
    for name in layers:
        check_hessian(plain.get_submodule(name), seen[name], hessians[name])


def test_batches_and_the_layers_that_share_a_weight_add_up():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    attach(model, quantizer="obc")
    batches = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), HessianRecorder(model, sites(model)[:1]) as recorder:
        middle = [model[0](batch) for batch in batches]
        for batch in middle:
            model[1](batch)
    inputs = torch.cat([*batches, *middle]).double()
    torch.testing.assert_close(recorder.hessians["0"][0], 2 * inputs.T @ inputs, rtol=1e-5, atol=1e-6)


def test_a_standardized_convolution_does_not_feel_a_constant():
    layer = StdConv2d(3, 4, 3, padding=1)
    inputs = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 5
    (hessian,) = recorded(nn.Sequential(layer), inputs).values()
    constant = torch.ones(1, 27)
    assert row_errors(constant, hessian) < 1e-9 * hessian[0].diagonal().sum()
    columns = nn.functional.unfold(inputs.double(), 3, padding=1).permute(1, 0, 2).flatten(1)
    centered = columns - columns.mean(0)
    torch.testing.assert_close(hessian[0], 2 * centered @ centered.T, rtol=1e-5, atol=1e-3)


class Tricky(nn.Module):
    """Owns a weight that it never uses, and calls a layer whose weight has the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.inner = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs)


def test_the_inputs_of_another_layer_are_not_taken_for_ones_own():
    model = nn.Sequential(Tricky())
    attach(model, quantizer="obc", exclude=["0.inner"])
    with torch.no_grad(), HessianRecorder(model, sites(model)) as recorder:
        model(torch.ones(2, 4))
    assert recorder.hessians == {}


@pytest.mark.parametrize(
    ("make", "inputs", "seen"),
    [
        (lambda: nn.Embedding(5, 3), torch.tensor([1, 2]), set()),
        (lambda: nn.ConvTranspose2d(2, 3, 2), torch.ones(1, 2, 4, 4), set()),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), torch.ones(1, 3, 4), {"linear1", "linear2"}),
    ],
)
def test_what_cannot_be_seen_is_left_out(make, inputs, seen):
    model = make().train()  # in evaluation mode torch's encoder layer may take one fused operation for everything
    assert recorded(model, inputs).keys() == seen


def test_nothing_is_watched_after_the_context():
    model = nn.Sequential(nn.Linear(2, 2))
    attach(model, quantizer="obc")
    with HessianRecorder(model, sites(model)) as recorder:
        pass
    model(torch.ones(1, 2))
    assert recorder.hessians == {}
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
