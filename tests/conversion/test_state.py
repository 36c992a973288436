"""State travels: a state dict, a copy, an average or a cast of an attached model answers as the model does."""

# attributes of modules and options that are not there are what is tested
# pyright: reportArgumentType=false
# pyright: reportCallIssue=false
# pyright: reportOptionalMemberAccess=false
# pyright: reportPrivateImportUsage=false

import copy
import io
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from qtdog.conversion.attach import attach, attached
from qtdog.conversion.load import load_into, plain_state_dict
from qtdog.conversion.save import bake, save
from qtdog.quantizers.registry import QUANTIZERS

IN_TRAINING = [name for name in QUANTIZERS if name not in ("gptq", "obc")]
few = settings(max_examples=3, deadline=None)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = cell(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0].mean(1))


BODIES = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (4, 6)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2)), (2, 2, 7, 7)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), (2, 4, 5, 5)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), None),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 5, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), (2, 7, 6)),
    "gru": (lambda: Recurrent(nn.GRU), (2, 7, 6)),
}


def inputs(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    if shape is None:
        return torch.randint(9, (3, 5), generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def fit(model, x, steps=3, *, quantizers=None, start=0):
    handle = quantizers or attached(model)
    optimizer = torch.optim.Adam(handle.param_groups(lr=1e-2))
    for step in range(steps):
        handle.begin_step(start + step, step / steps)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


def trained(name, body, *, bits=4):
    torch.manual_seed(0)
    make, shape = BODIES[body]
    model = make()
    handle = attach(model, bits=bits, quantizer=name)
    handle.enable()
    x = inputs(shape)
    fit(model, x, quantizers=handle)
    handle.begin_step(9, 0.999)
    return model, x


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", IN_TRAINING)
@few
@given(bits=st.integers(2, 8))
def test_state_dict_copy_and_file_answer_as_the_model(tmp_path_factory, name, body, bits):
    model, x = trained(name, body, bits=bits)
    expected = model.eval()(x)
    fresh = BODIES[body][0]()
    handle = attach(fresh, bits=bits, quantizer=name)
    assert not handle.enabled
    fresh.load_state_dict(model.state_dict())
    assert attached(fresh).enabled
    assert torch.equal(fresh.eval()(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    path = tmp_path_factory.mktemp("file") / "m"
    save(model, path)
    torch.testing.assert_close(load_into(path, BODIES[body][0]())(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("body", ["lstm", "gru"])
def test_recurrent_layers_compute_with_quantized_weights(body):
    torch.manual_seed(0)
    make, shape = BODIES[body]
    model, x = make(), inputs(shape)
    plain = model(x)
    handle = attach(model, bits=2)
    assert sum(name.startswith("cell.weight_") for name in handle.layers) == 8
    handle.enable()
    assert not torch.allclose(model(x), plain, atol=1e-3)
    twin = make()
    twin.load_state_dict(plain_state_dict(bake(model)))
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=1e-6)
    fit(model, x)
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


EMAS = {
    "AveragedModel": (lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), "update_parameters"),
    "AveragedModel of buffers": (
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        "update_parameters",
    ),
    "ModelEmaV3": (lambda model: ModelEmaV3(model, decay=0.9), "update"),
}


@pytest.mark.parametrize("ema", EMAS)
@pytest.mark.parametrize(
    ("name", "options"), [("lsq", {}), ("lsq", {"step_mode": "raw"}), ("released", {}), ("inq", {})]
)
def test_an_average_begun_before_enable_has_the_step_sizes_of_after(ema, name, options):
    if ema == "AveragedModel of buffers" and name == "inq":
        pytest.skip("torch itself refuses to average truth values")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    handle = attach(model, quantizer=name, **options)
    make, update = EMAS[ema]
    average, x = make(model), torch.randn(16, 6)
    optimizer = torch.optim.SGD(handle.param_groups(lr=1e-2))
    kept = []
    for step in range(8):
        if step == 4:
            handle.enable()
        if step >= 4:
            handle.begin_step(step, (step - 4) / 4)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        getattr(average, update)(model)
        if step >= 4:
            kept.append(handle.layers["0"].step_sizes().detach().clone())
    twin = attached(average.module)
    assert twin.enabled
    weights = torch.tensor([0.9 ** (3 - index) for index in range(4)]).double()
    stack = torch.stack(kept).double()
    mean = (weights[:, None] * (stack.log() if options == {} else stack)).sum(0) / weights.sum()
    found = twin.layers["0"].step_sizes().detach().double()
    torch.testing.assert_close(found, mean.exp() if options == {} else mean, rtol=1e-4, atol=0)
    average.module.eval()(x)


def test_an_average_follows_enable_without_any_call():
    model = nn.Linear(6, 3)
    handle = attach(model, bits=2)
    average = AveragedModel(model)
    handle.enable()
    average.update_parameters(model)
    x = torch.randn(4, 6)
    assert torch.equal(average(x), model(x))


@pytest.mark.parametrize("name", [name for name in IN_TRAINING if name != "freeze"])
def test_a_state_dict_from_before_the_flag_is_read(name):
    model, x = trained(name, "linear")
    old = {key: value for key, value in model.state_dict().items() if not key.endswith("_share")}
    fresh = BODIES["linear"][0]()
    handle = attach(fresh, bits=4, quantizer=name)
    fresh.load_state_dict(old)
    if name not in ("ste", "dorefa", "noise-accumulated", "noise-fresh"):  # these leave no trace in an old state dict
        assert handle.enabled
    handle.set_enabled(True)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("when", ["before attach", "before enable", "after enable"])
@pytest.mark.parametrize("name", IN_TRAINING)
def test_casts_keep_float32_step_sizes_and_save(tmp_path, name, when, dtype):
    torch.manual_seed(0)
    make = BODIES["linear"][0]
    model = make().to(dtype) if when == "before attach" else make()
    options = {"stages": (1.0,)} if name == "inq" else {}
    handle = attach(model, bits=4, quantizer=name, **options)
    if when == "before enable":
        model.to(dtype)
    handle.enable()
    model.to(dtype).eval()
    steps = [quantizer.step_sizes() for quantizer in handle.layers.values()]
    assert all(step is None or step.dtype == torch.float32 for step in steps)
    save(model, tmp_path / "m")
    x = torch.randn(4, 6).to(dtype)
    assert torch.equal(load_into(tmp_path / "m", make().to(dtype))(x), model(x))


def test_frozen_weights_have_frozen_step_sizes_and_add_to_completes_an_optimizer():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=1e-2, weight_decay=0.1)
    handle = attach(model, bits=4)
    assert len(handle.step_size_parameters()) == 1
    handle.add_to(optimizer, step_size_lr=0.5)
    handle.add_to(optimizer)
    assert [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (2, 1e-2, 0.1),
        (1, 5e-3, 0.0),
    ]


@pytest.mark.parametrize("mode", ["log", "raw"])
def test_step_sizes_freeze_and_thaw_with_their_weight_until_enable(mode, recwarn):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([model[0].weight, *model[1].parameters()], lr=1e-2)
    handle = attach(model, bits=4, step_mode=mode)
    updates(model, optimizer)
    model[0].weight.requires_grad_(True)
    model[1].weight.requires_grad_(False)
    handle.enable()
    first, second = handle.layers.values()
    trains = [
        [value.requires_grad for name, value in one.named_parameters() if "scale" in name] for one in (first, second)
    ]
    assert trains == [[True], [False]]
    with pytest.warns(UserWarning, match=r"step sizes of 1 quantized layers \('0'"):
        updates(model, optimizer)


def test_a_state_of_another_grid_is_refused_with_the_layers_name():
    def make(**options):
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
        return model, attach(model, **options)

    other, handle = make(bits=4)
    fresh, _ = make(layer_bits={"1": 4})
    fresh.load_state_dict(other.state_dict())  # nothing is in use yet
    handle.enable()
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    with pytest.raises(
        RuntimeError, match=r"0\.parametrizations\.weight\.0: its step sizes are .*'bits': 4.* has .*'bits': 7"
    ):
        fresh.load_state_dict(saved)
    alike, _ = make(bits=4)
    alike.load_state_dict(saved)
    x = torch.randn(2, 6)
    assert torch.equal(alike(x), other(x))


def updates(model, *optimizers, n=3):
    for _ in range(n):
        model(torch.randn(4, 6)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_step_sizes_in_no_optimizer_are_warned_about_once(recwarn):
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle = attach(model)
    updates(model, optimizer)
    assert not recwarn.list
    handle.enable()
    with pytest.warns(UserWarning, match="step sizes of 1 quantized layers .* in no optimizer"):
        updates(model, optimizer)
    updates(model, optimizer)


def test_step_sizes_in_another_optimizer_are_fine():
    model = nn.Linear(6, 3)
    first = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle = attach(model)
    handle.enable()
    updates(model, first, torch.optim.SGD(handle.step_size_parameters(), lr=1e-2))


def reloaded(model):
    """Return the model as a file of torch brings it back."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for value in twin.parameters():
            value.zero_()
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


class Around(nn.Module):
    def __init__(self, module, call) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x):
        return self.call(self.module, x)


def functional(model, x):
    return torch.func.functional_call(model, dict(model.named_parameters()) | dict(model.named_buffers()), (x,))


COPYING = {"copy": copy.deepcopy, "file": reloaded, "AveragedModel": AveragedModel, "ModelEmaV3": ModelEmaV3}
HOLDING = {
    "DataParallel": nn.DataParallel,
    "gradient checkpointing": lambda model: Around(model, partial(checkpoint, use_reentrant=False)),
    "functional_call": lambda model: Around(model, functional),
}


@settings(max_examples=20)
@given(
    name=st.sampled_from([*IN_TRAINING]),
    body=st.sampled_from([*BODIES]),
    wrapper=st.sampled_from([*COPYING, *HOLDING]),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["channel", "layer"]),
)
def test_what_is_around_a_model_changes_neither_answers_nor_file(
    tmp_path_factory, name, body, wrapper, bits, granularity
):
    torch.manual_seed(0)
    make, shape = BODIES[body]
    model, x = make(), inputs(shape)
    handle = attach(model, bits=bits, quantizer=name, granularity=granularity)
    if wrapper in HOLDING:  # made early, it trains the model itself
        wrapped = HOLDING[wrapper](model)
        handle.enable()
        fit(wrapped, x, quantizers=handle)
        handle.begin_step(9, 0.999)
    else:
        handle.enable()
        fit(model, x, quantizers=handle)
        handle.begin_step(9, 0.999)
        wrapped = COPYING[wrapper](model)
    expected = model.eval()(x)
    assert torch.equal(wrapped.eval()(x), expected)
    path = tmp_path_factory.mktemp("file") / "m"
    save(wrapped, path)
    torch.testing.assert_close(load_into(path, make())(x), expected, rtol=0, atol=1e-6)
