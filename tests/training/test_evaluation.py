"""Statistics of batch norm for averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, Interrupted
from qtdog.core.progress import StopAfter
from qtdog.data.dataset import DomainSubset
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.checkpoint import latest_checkpoint
from qtdog.training.evaluation import N_BATCHES, estimate_statistics_, fit_batch_norm_
from qtdog.training.load_model import load_model
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run

FEW = 3


@pytest.fixture
def config(short_config, three_digits) -> Config:
    model = {"backbone": "test_resnet", "weights": "none", "freeze_bn": False}
    train = {"steps": 4, "eval_every": 2}
    data = {"target": "75", "batch_size": 3, "image_size": 16}
    averager = {"name": "sma", "params": {"start": 1}}
    quantizer = {"name": "lsq", "start_step": 1}
    return resolve(
        short_config(model=model, train=train, data=data, averager=averager, quantizer=quantizer), three_digits
    )


def by_hand(network: nn.Module, batches: list, forward: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """The mean over batches of what each batch-norm layer's input has for mean and unbiased variance."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> None:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            dims = [dim for dim in range(inputs[0].ndim) if dim != 1]
            found.setdefault(f"{name}.running_mean", []).append(inputs[0].double().mean(dims))
            found.setdefault(f"{name}.running_var", []).append(inputs[0].double().var(dims))

        handles.append(network.get_submodule(name).register_forward_pre_hook(note))

    handles: list = []
    layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    for name in layers:
        hook(name)
    network.eval()
    for name in layers:
        network.get_submodule(name).train()  # each layer passes on what it normalizes with the batch
    with torch.no_grad():
        for inputs in batches:
            (forward or network)(*inputs) if isinstance(inputs, tuple) else network(inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(values).mean(0) for name, values in found.items()}


def test_statistics_are_those_of_a_manual_pass():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )
    network[1].eval()
    batches = [torch.randn(6, 1, 8, 8) * (index + 1) for index in range(4)]
    estimate_statistics_(network, iter(batches))
    assert [layer.training for layer in network] == [True, False, True, True, True]
    assert (network[1].momentum, network[4].momentum) == (0.3, 0.1)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for name, value in by_hand(network, batches).items():
        torch.testing.assert_close(state[name].double(), value, rtol=1e-5, atol=1e-6)


def test_what_was_there_before_does_not_count(config, three_digits):
    parts = build_components(config, three_digits)
    results = []
    for start in (0.0, 5.0):
        for name, buffer in parts.network.named_buffers():
            if "running" in name:
                buffer.fill_(start)
        fit_batch_norm_(parts, FEW)
        results.append({name: buffer.clone() for name, buffer in parts.network.named_buffers()})
    assert any("running_mean" in name for name in results[0])
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert parts.network.training


def test_frozen_statistics_stay(config, three_digits):
    frozen = config.model_copy(update={"model": config.model.model_copy(update={"freeze_bn": True})})
    parts = build_components(frozen, three_digits)
    before = {name: buffer.clone() for name, buffer in parts.network.named_buffers()}
    fit_batch_norm_(parts, FEW)
    assert all(torch.equal(buffer, before[name]) for name, buffer in parts.network.named_buffers())


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_the_batch_norm_of_a_context_is_measured_domain_by_domain(config, three_digits, freeze_bn):
    layer = {"freeze_bn": freeze_bn, "feature_layer": "context", "feature_params": {"width": 4}}
    model = config.model.model_copy(update=layer)
    objective = config.objective.model_copy(update={"name": "arm"})
    arm = config.model_copy(update={"model": model, "objective": objective})
    parts = build_components(arm, three_digits)
    before = {name: buffer.clone() for name, buffer in parts.network.named_buffers()}
    fit_batch_norm_(parts, FEW)
    fitted = {name: buffer.clone() for name, buffer in parts.network.named_buffers()}
    learning = "context." if freeze_bn else ""
    assert all(torch.equal(fitted[name], before[name]) for name in fitted if not name.startswith(learning))
    batches = [parts.batches.batch(step) for step in range(FEW)]
    if freeze_bn:
        assert parts.network.context is not None
        expected = by_hand(parts.network.context, [batch.images for batch in batches])
        expected = {f"context.{name}": value for name, value in expected.items()}
    else:
        expected = by_hand(parts.network, [(batch.images, batch.sizes) for batch in batches], parts.network.features)
    for name, value in expected.items():
        torch.testing.assert_close(fitted[name].double(), value, rtol=1e-4, atol=1e-5)


def test_the_shipped_average_has_the_statistics_of_its_own_weights(config, three_digits, tmp_path):
    folder = RunFolder(tmp_path / "run")
    result = run(config, three_digits, folder)
    assert result["kept"] == f"average of updates 2 to {result['selected_step']}"
    network = load_model(folder.model_file).network
    shipped = {name: buffer.clone() for name, buffer in network.named_buffers()}
    parts = build_components(config, three_digits)
    for name, value in by_hand(network, [parts.batches.batch(step).images for step in range(N_BATCHES)]).items():
        torch.testing.assert_close(shipped[name].double(), value, rtol=1e-4, atol=1e-5)


def test_training_goes_on_with_its_own_statistics_and_resumes_exactly(config, three_digits, tmp_path):
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, three_digits, whole)
    with pytest.raises(Interrupted):
        run(config, three_digits, broken, callbacks=RunCallbacks(StopAfter(3)))
    run(config, three_digits, broken, resume=True)
    assert whole.model_file.read_bytes() == broken.model_file.read_bytes()

    bare = config.model_copy(update={"averager": config.averager.model_copy(update={"name": "none", "params": {}})})
    run(bare, three_digits, RunFolder(tmp_path / "bare"))
    ends = [latest_checkpoint(RunFolder(tmp_path / name).checkpoints, print) for name in ("whole", "bare")]
    networks = [end.tensors["network"] for end in ends if end is not None]
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())


def test_a_batch_of_one_value_per_channel_is_refused_with_advice(config, digits, tmp_path):
    data = config.data.model_copy(update={"batch_size": 1, "target": "none"})
    alone = DomainSubset(digits, ["0"])
    config = resolve(config.model_copy(update={"data": data.model_copy(update={"content": ""})}), alone)
    with pytest.raises(ConfigError, match=r"one value per channel: take a larger batch.* model\.freeze_bn=true"):
        run(config, alone, RunFolder(tmp_path / "r"))
