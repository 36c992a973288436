import copy

import pytest
import timm
import torch
from torch import nn

from qtdog.conversion.attach import attach, attached
from qtdog.conversion.inspect import layer_report
from qtdog.conversion.load import plain_state_dict
from qtdog.conversion.save import bake
from qtdog.core.errors import ConfigError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 4)

    def forward(self, x):
        return self.classifier(self.norm(self.conv(x)).relu().mean((2, 3)))


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3), (2, 2, 5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 3), (2, 3, 5, 5)),
    "linear": (lambda: nn.Linear(6, 4), (2, 6)),
    "lite0": (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=3), (2, 3, 32, 32)),
    "standardized": (lambda: timm.create_model("resnetv2_50x1_bit", num_classes=2), (1, 3, 32, 32)),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, depth=1), (1, 3, 32, 32)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_any_layer_type_attaches_quantizes_and_bakes(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, inputs = make().eval(), torch.randn(shape)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = model(inputs)
    handle = attach(model, bits=4)
    assert torch.equal(model(inputs), plain)
    handle.enable()
    quantized = model(inputs)
    assert not torch.equal(quantized, plain)
    fresh = make().eval()
    fresh.load_state_dict(plain_state_dict(bake(model)))
    assert torch.equal(fresh(inputs), quantized)
    baked = bake(model)
    assert baked.quantized.keys() | baked.rest.keys() == before.keys()


def test_attention_in_projection_is_covered():
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    handle = attach(model, bits=3)
    assert set(handle.layers) == {"in_proj_weight", "out_proj"}
    handle.enable()
    x = torch.randn(2, 5, 8)
    fresh = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    fresh.load_state_dict(plain_state_dict(bake(model)))
    torch.testing.assert_close(model(x, x, x)[0], fresh(x, x, x)[0], rtol=0, atol=1e-6)


def test_parameters_stay_the_same_objects():
    model = Net()
    before = {id(p) for p in model.parameters()}
    handle = attach(model, exclude=["classifier"])
    assert before <= {id(p) for p in model.parameters()}
    groups = handle.param_groups(1e-3, weight_decay=0.1, step_size_lr=2.0)
    assert {id(p) for p in groups[0]["params"]} == before
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[1]["lr"] == 2e-3
    assert [tuple(p.shape) for p in groups[1]["params"]] == [(8,)]


@pytest.mark.parametrize("mode", ["log", "raw"])
def test_weights_and_step_sizes_move_and_adam_state_survives_the_start(mode):
    torch.manual_seed(0)
    model = Net()
    handle = attach(model, bits=4, exclude=["classifier"], step_mode=mode)
    optimizer = torch.optim.Adam(handle.param_groups(1e-3))
    x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    weight = dict(model.named_parameters())["conv.parametrizations.weight.original"]
    moment = optimizer.state[weight]["exp_avg"]
    assert moment.abs().sum() > 0
    keys = list(model.state_dict())
    handle.enable()
    assert optimizer.state[weight]["exp_avg"] is moment
    assert list(model.state_dict()) == keys
    start_weight = weight.detach().clone()
    start_steps = handle.layers["conv"].step_sizes()
    assert start_steps is not None
    start_steps = start_steps.detach().clone()
    for _ in range(3):
        step()
    assert (weight != start_weight).float().mean() > 0.9
    steps = handle.layers["conv"].step_sizes()
    assert (steps != start_steps).all()
    assert optimizer.state[weight]["step"] == 4


def test_enabling_twice_does_nothing_and_restoring_does_not_initialize():
    model = Net()
    handle = attach(model, exclude=["classifier"])
    handle.enable()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        next(model.conv.parameters()).mul_(3)
    handle.enable()
    key = "conv.parametrizations.weight.0.log_scale"
    assert torch.equal(model.state_dict()[key], state[key])
    other = Net()
    restored = attach(other, exclude=["classifier"])
    other.load_state_dict(state)
    restored.set_enabled(True)
    assert restored.enabled
    assert torch.equal(other.state_dict()[key], state[key])


def test_one_step_size_per_channel_or_per_layer():
    for granularity, shape in (("channel", (8,)), ("layer", (1,))):
        model = Net()
        handle = attach(model, granularity=granularity, exclude=["classifier"])
        assert [tuple(p.shape) for p in handle.param_groups(1.0)[1]["params"]] == [shape]


def test_transposed_convolution_has_its_output_channel_on_axis_one():
    model = nn.ConvTranspose2d(3, 5, 3)
    assert attach(model).layers["weight"].spec.axis == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["classifer"]}, "unknown layer pattern 'classifer'; did you mean 'classifier'"),
        ({"include": ["features.*"]}, "unknown layer pattern"),
        ({"include": ["conv"], "exclude": ["conv"]}, "no layer is left"),
        ({"bits": 1}, "2 to 8, not 1"),
        ({"bits": 9}, "2 to 8, not 9"),
        ({"granularity": "chanel"}, "did you mean 'channel'"),
        ({"step_mode": "lg"}, "step mode"),
        ({"quantizer": "lqs"}, "did you mean 'lsq'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ConfigError, match=message):
        attach(Net(), **options)


def test_attaching_twice_is_refused_and_a_plain_model_has_none():
    model = Net()
    with pytest.raises(ConfigError, match="attach"):
        attached(model)
    attach(model)
    with pytest.raises(ConfigError, match="already"):
        attach(model)


def test_include_and_exclude_patterns():
    model = timm.create_model("test_resnet.r160_in1k", num_classes=2)
    handle = attach(model, include=["layer*"], exclude=["layer1"])
    assert handle.layers
    assert all(name.startswith("layer") and not name.startswith("layer1") for name in handle.layers)


def test_baking_leaves_the_model_and_its_copy_alone():
    """The traps: a deep copy shares its dynamic class, and removing parametrizations there deletes the weight here."""
    model = Net()
    handle = attach(model, exclude=["classifier"])
    handle.enable()
    x = torch.randn(2, 3, 8, 8)
    model.eval()
    before = model(x)
    twin = copy.deepcopy(model)
    bake(model)
    bake(twin)
    assert torch.equal(model(x), before)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.get_parameter("conv.parametrizations.weight.original").add_(1)
    assert torch.equal(model(x), before)


def test_baking_before_the_start_is_the_plain_model():
    model = Net()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    attach(model)
    baked = bake(model)
    assert baked.quantized == {}
    assert baked.rest.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in baked.rest.items())


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    attach(model).enable()
    baked = bake(model)
    assert baked.quantized["a.weight"] is baked.quantized["b.weight"]
    with pytest.raises(ConfigError, match="share one weight"):
        attach(Tied(), exclude=["b"])


def test_layer_report_counts_codes_and_clipped_weights():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, -0.1, 0.1, 3.0]]))
    handle = attach(model, bits=3)
    assert layer_report(model) == []
    handle.enable()
    (row,) = layer_report(model)
    step = 2 * (3.3 / 4) / 3**0.5
    assert row.step_size_mean == pytest.approx(step, rel=1e-5)
    assert (row.shape, row.bits, row.n_weights, row.codes_used) == ((1, 4), 3, 4, 2)
    assert row.clipped_frac == (0.25 if 3.0 / step >= 3 else 0.0)


def test_bf16_autocast_trains():
    model = Net()
    handle = attach(model, exclude=["classifier"])
    handle.enable()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 3, 8, 8)).float().square().mean()
    loss.backward()
    grads = [p.grad for group in handle.param_groups(1.0) for p in group["params"]]
    assert all(grad is not None and torch.isfinite(grad).all() and grad.dtype == torch.float32 for grad in grads)
