"""What is saved is what was computed: edits of computed weights, things on top of a quantizer, and refusals at once."""

# attributes of modules and options that are not there are what is tested
# pyright: reportArgumentType=false
# pyright: reportCallIssue=false
# pyright: reportIndexIssue=false
# pyright: reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from qtdog.conversion.attach import attach, attached
from qtdog.conversion.inspect import layer_report
from qtdog.conversion.load import load_into
from qtdog.conversion.save import save
from qtdog.core.errors import ConfigError, ModelError
from qtdog.quantizers.registry import QUANTIZERS

EDITS = {
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(3, 6)),
    "data.copy_": lambda layer: layer.weight.data.copy_(torch.zeros(3, 6)),
    "data +=": lambda layer: layer.weight.data.__iadd__(1),
    "data =": lambda layer: setattr(layer.weight, "data", torch.zeros(3, 6)),
    "detach": lambda layer: layer.weight.detach().mul_(2),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "init normal": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "index": lambda layer: layer.weight.__setitem__(0, 1.0),
    "+=": lambda layer: layer.weight.__iadd__(1),
    "freeze": lambda layer: layer.weight.requires_grad_(not layer.weight.requires_grad),
    "frozen": lambda layer: setattr(layer.weight, "requires_grad", False),
    "grad": lambda layer: setattr(layer.weight, "grad", None),
}
ON_A_GRID = ["lsq", "ste", "dorefa", "inq", "released", "rtn"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ON_A_GRID)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_in_place_of_a_computed_weight_raises(edit, name, grad):
    layer = nn.Linear(6, 3)
    attach(layer, quantizer=name, bits=4).enable()
    with torch.set_grad_enabled(grad), pytest.raises(ModelError, match="would be lost"):
        EDITS[edit](layer)


def test_an_array_of_a_computed_weight_is_read_only():
    layer = nn.Linear(6, 3)
    attach(layer, bits=4).enable()
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.detach().cpu().numpy()[0] = 1


class Masked(nn.Module):
    def forward(self, weight):
        return weight * 0.5


ON_TOP = {
    "l1 mask": lambda layer, name: prune.l1_unstructured(layer, name, 0.5),
    "random mask": lambda layer, name: prune.random_unstructured(layer, name, 0.5),
    "structured mask": lambda layer, name: prune.ln_structured(layer, name, 0.5, n=2, dim=0),
    "custom mask": lambda layer, name: prune.custom_from_mask(layer, name, torch.ones_like(getattr(layer, name))),
    "no mask": prune.identity,
    "global mask": lambda layer, name: prune.global_unstructured([(layer, name)], prune.L1Unstructured, amount=0.5),
    "old weight_norm": lambda layer, name: nn.utils.weight_norm(layer, name),
    "old spectral_norm": lambda layer, name: nn.utils.spectral_norm(layer, name),
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "one's own": lambda layer, name: parametrize.register_parametrization(layer, name, Masked()),
    "unsafe": lambda layer, name: parametrize.register_parametrization(layer, name, Masked(), unsafe=True),
    "extend": lambda layer, name: layer.parametrizations[name].extend([Masked()]),
    "insert": lambda layer, name: layer.parametrizations[name].insert(0, Masked()),
}
CARRIERS = {
    "linear": (lambda: nn.Linear(6, 3), "weight"),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, groups=1), "weight"),
    "recurrent": (lambda: nn.LSTM(4, 5), "weight_hh_l0"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("add", ON_TOP)
def test_nothing_else_may_compute_the_weight_of_a_quantized_layer(add, carrier):
    make, name = CARRIERS[carrier]
    for state in ("attached", "enabled", "copied"):
        model = nn.ModuleDict({"body": make()})
        handle = attach(model, bits=4, quantizer="ste")
        if state != "attached":
            handle.enable()
        if state == "copied":
            model = copy.deepcopy(model)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ModelError, match=r"layer 'body[.\w]*' has a quantizer, and"):
            ON_TOP[add](model["body"], name)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_mask_on_a_bias_and_a_removed_quantizer_are_left_to_torch():
    layer = nn.Linear(6, 3)
    attach(layer).enable()
    prune.l1_unstructured(layer, "bias", 1)
    assert (layer.bias == 0).sum() == 1
    parametrize.remove_parametrizations(layer, "weight")
    prune.l1_unstructured(layer, "weight", 9)
    assert (layer.weight == 0).sum() == 9


@pytest.mark.parametrize(("gamma", "fits"), [(1.5, True), (200.0, False), (0.001, False)])
def test_a_fused_batch_norm_takes_effect_or_is_warned_of(gamma, fits, recwarn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    nn.init.constant_(model[1].weight, gamma)
    attach(model, bits=8).enable()
    x = torch.randn(2, 3, 8, 8)
    fused = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    told = [str(one.message) for one in recwarn if "does not fit its step sizes" in str(one.message)]
    assert bool(told) is not fits
    off = (fused(x) - model(x)).norm() / model(x).norm()
    if fits:
        assert off < 0.06
    else:
        assert "layer '0'" in told[0]
        assert off > 0.3
        attached(fused).set_enabled(False)
        attached(fused).enable()  # the remedy that the warning names
        assert (fused(x) - model(x)).norm() / model(x).norm() < 0.06


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name not in ("gptq", "obc")])
def test_an_edit_before_enable_takes_effect(name):
    layer = nn.Linear(6, 3)
    attach(layer, quantizer=name, bits=4)
    nn.init.ones_(layer.weight)
    assert torch.equal(layer.weight, torch.ones(3, 6))


@pytest.mark.parametrize("name", ["lsq", "ste", "dorefa", "released"])
def test_an_assignment_sets_the_weight_behind_the_quantizer(name):
    layer = nn.Linear(6, 3)
    handle = attach(layer, quantizer=name, bits=8)
    handle.enable()
    new = torch.rand(3, 6) / 2 - 0.25
    layer.weight = nn.Parameter(new)
    assert torch.equal(handle.weights_()["weight"], new)
    assert (layer.weight - new).abs().max() < 0.1


@pytest.mark.parametrize("name", ["inq", "rtn"])
def test_what_is_kept_as_codes_takes_no_new_weight(name):
    layer = nn.Linear(6, 3)
    handle = attach(layer, quantizer=name)
    handle.enable()
    with pytest.raises(ModelError, match="holds codes"):
        layer.weight = torch.zeros(3, 6)
    with pytest.raises(ModelError, match="kept as codes"):
        handle.weights_()


def test_lora_is_merged_through_the_weights_behind(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    handle = attach(model, bits=8)
    handle.enable()
    delta = torch.randn(8, 2) @ torch.randn(2, 6) / 20
    before = model[0].weight.clone()
    with torch.no_grad():
        handle.weights_()["0"].add_(delta)
    assert (model[0].weight - before - delta).abs().max() <= handle.layers["0"].step_sizes().max()
    save(model, tmp_path / "m")
    plain = load_into(tmp_path / "m", nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    x = torch.randn(4, 6)
    assert torch.equal(plain(x), model.eval()(x))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_weight_that_is_not_finite_is_refused_before_anything_is_enabled(bad):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    handle = attach(model)
    with torch.no_grad():
        model[1].weight[0, 0] = bad
    with pytest.raises(ModelError, match="layer '1' is not finite"):
        handle.enable()
    assert not any(quantizer.enabled for quantizer in handle.layers.values())


def test_a_weight_without_values_is_refused_at_enable():
    layer = nn.Linear(6, 3, device="meta")
    with pytest.raises(ModelError, match="layer 'weight' has no values yet"):
        attach(layer).enable()


class WithBuffer(nn.Linear):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__(6, 3)
        self.register_buffer("table", value)


class WithExtra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
        (lambda: nn.EmbeddingBag(5, 4, sparse=True), "sparse"),
        (lambda: WithBuffer(torch.zeros(2, dtype=torch.complex64)), "'table' is torch.complex64"),
        (lambda: WithBuffer(torch.tensor([float("nan")])), "'table' holds NaN"),
        (lambda: WithExtra(6, 3), "is no tensor but dict"),
        (lambda: WithBuffer(torch.eye(3).to_sparse()), "'table' is torch.sparse_coo"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "'0' has no shape yet"),
        (lambda: torch.jit.script(nn.Linear(6, 3)), r"stay 'weight' \(scripted\)"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
            r"stay 'weight' \(parametrized by _WeightNorm",
        ),
    ],
)
def test_what_no_file_could_hold_is_refused_at_attach(make, message):
    with pytest.raises(ConfigError, match=message):
        attach(make())


def test_bits_may_be_any_whole_number():
    layer = nn.Linear(6, 3)
    handle = attach(layer, bits=np.int64(4), layer_bits={"weight": np.int32(3)})
    assert handle.layers["weight"].spec.bits == 3
    for bad in (True, 4.0, np.float32(4), "4"):
        with pytest.raises(ConfigError, match="whole number"):
            attach(nn.Linear(6, 3), bits=bad)


def trained(name, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    handle = attach(model, quantizer=name, layer_bits={"0": 3, "2": 5}, **options)
    handle.enable()
    optimizer = torch.optim.Adam(handle.param_groups(lr=1e-2))
    for step in range(20):
        handle.begin_step(step, step / 20)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(3, (16,))).backward()
        optimizer.step()
    return model


LIKE = [("lsq", {}), ("lsq", {"step_mode": "raw"}), ("lsq", {"step_mode": "frozen"}), ("lsq", {"range": "symmetric"})]
LIKE += [("inq", {}), ("rtn", {}), ("released", {}), ("noise-then-round", {})]


@pytest.mark.parametrize(("name", "options"), LIKE)
def test_tuning_goes_on_from_a_file(tmp_path, name, options):
    model = trained(name, **options)
    save(model, tmp_path / "m")
    fresh = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).train()
    ours = {key: value for key, value in options.items() if key == "step_mode"}
    handle = attach(fresh, like=tmp_path / "m", quantizer=name, **ours)
    assert fresh.training
    assert handle.enabled
    x = torch.randn(4, 6)
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=0, atol=1e-5)
    for one, other in zip(layer_report(fresh), layer_report(model), strict=True):
        assert (one.name, one.bits, one.codes_used) == (other.name, other.bits, other.codes_used)
        assert one.step_size_mean == pytest.approx(other.step_size_mean, rel=1e-6)
    save(fresh, tmp_path / "again")
    again = load_into(tmp_path / "again", nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    assert torch.equal(again(x), fresh(x))


def test_tuning_from_a_file_leaves_its_float_layers_and_refuses_what_does_not_fit(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    attach(model, exclude=["1"]).enable()
    save(model, tmp_path / "m")
    fresh = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    assert list(attach(fresh, like=tmp_path / "m").layers) == ["0"]
    assert list(attached(fresh).layers) == ["0"]
    plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with pytest.raises(ConfigError, match="leave those arguments out"):
        attach(plain, like=tmp_path / "m", bits=4)
    with pytest.raises(ConfigError, match="INQ has"):
        attach(plain, like=tmp_path / "m", quantizer="inq")
    with pytest.raises(ModelError, match="does not fit"):
        attach(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3)), like=tmp_path / "m")
    assert not list(parametrized(plain))


def parametrized(model):
    return [module for module in model.modules() if parametrize.is_parametrized(module)]


FOREACH_MUL_: Any = vars(torch)["_foreach_mul_"]
FOREACH_ADD_: Any = vars(torch)["_foreach_add_"]
WRITES = {
    "out": lambda weight: torch.add(weight.clone(), 1, out=weight),
    "several outs": lambda weight: torch.max(torch.ones(3, *weight.shape), 0, out=(weight, weight.clone().long())),
    "function in place": lambda weight: torch.relu_(weight),
    "inplace": lambda weight: torch.nn.functional.relu(weight, inplace=True),
    "foreach": lambda weight: FOREACH_MUL_([torch.ones(2), weight], 2.0),
    "method": lambda weight: weight.mul_(2),
    "item": lambda weight: weight.__setitem__(0, 0.0),
    "operator": lambda weight: weight.__iadd__(1),
    "init": lambda weight: torch.nn.init.zeros_(weight),
    "copy": lambda weight: weight.detach().copy_(torch.zeros_like(weight)),
}


@pytest.mark.parametrize("name", WRITES)
def test_every_way_to_write_to_a_computed_weight_is_refused(name):
    layer = nn.Linear(4, 3)
    attach(layer).enable()
    before = layer.weight.clone()
    with torch.no_grad(), pytest.raises(ModelError, match="computed at each use"):
        WRITES[name](layer.weight)
    assert torch.equal(layer.weight, before)


def test_reading_a_computed_weight_gives_plain_tensors():
    layer = nn.Linear(4, 3)
    attach(layer).enable()
    target = torch.zeros(3, 4)
    with torch.no_grad():
        FOREACH_ADD_([target], [layer.weight])
        torch.add(layer.weight, 1, out=torch.empty(3, 4))
    assert torch.equal(target, layer.weight)
    for value in (layer.weight + 1, layer.weight.clone(), torch.stack([layer.weight]), layer.weight.T):
        assert type(value) is torch.Tensor
