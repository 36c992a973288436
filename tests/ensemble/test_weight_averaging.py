"""The mean of weights, from run folders and as a pure function."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtdog.conversion.attach import attach
from qtdog.core.errors import ConfigError, RunError
from qtdog.ensemble.weight_averaging import average_weights, greedy, read_latent
from qtdog.runs.folder import RunFolder
from qtdog.training.checkpoint import latest_checkpoint
from qtdog.training.load_model import empty_network


@given(st.integers(1, 5), st.integers(0, 1000))
def test_average_is_the_mean_in_float64(n, seed):
    generator = torch.Generator().manual_seed(seed)
    states = [{"w": torch.randn(3, 4, generator=generator) * 10**k} for k in range(n)]
    expected = sum(state["w"].double() for state in states) / n
    assert torch.equal(average_weights(states)["w"], expected.float())


def test_average_of_one_is_itself_and_buffers_must_agree():
    state = {"w": torch.tensor([0.1, -3e-8]), "running_mean": torch.ones(2), "n": torch.tensor(4)}
    same = average_weights([state, state], {"running_mean", "n"})
    assert all(torch.equal(same[name], state[name]) for name in state)
    other = state | {"running_mean": torch.zeros(2)}
    with pytest.raises(ConfigError, match=r"'running_mean' differs.*freeze_bn"):
        average_weights([state, other], {"running_mean", "n"})


def test_greedy_keeps_what_does_not_hurt_and_begins_with_the_best():
    asked = []

    def score(chosen):
        asked.append(list(chosen))
        return {(2,): 0.8, (2, 0): 0.7, (2, 1): 0.8, (2, 1, 3): 0.9}[tuple(chosen)]

    assert greedy([0.6, 0.5, 0.8, 0.1], score) == [2, 1, 3]
    assert asked == [[2], [2, 0], [2, 1], [2, 1, 3]]


def test_latent_weights_give_the_shipped_codes_again(quantized):
    """Latent weights with the learned step sizes round to just what the model file holds."""
    for member in quantized:
        latent = read_latent(member, print)
        checkpoint = latest_checkpoint(RunFolder(member.path).checkpoints, print)
        assert checkpoint is not None
        network = empty_network(member.info)
        attach(network, bits=7, exclude=("classifier",)).set_enabled(True)
        network.load_state_dict(checkpoint.tensors["selected"])
        for name, value in member.packed.quantized.items():
            weight = latent.state[name]
            assert not torch.equal(weight, value.dequantize())
            module = network.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(module.get_parameter("bias"), member.packed.rest[name.replace("weight", "bias")])
            assert torch.equal(getattr(module, "weight"), value.dequantize())  # noqa: B009
            assert torch.equal(module.parametrizations.weight.original, weight)  # pyright: ignore
        assert torch.equal(latent.state["classifier.weight"], member.packed.rest["classifier.weight"])


def test_latent_weights_of_a_float_member_are_what_shipped(floats):
    latent = read_latent(floats[0], print)
    assert latent.state.keys() == floats[0].packed.rest.keys()
    assert all(torch.equal(latent.state[name], value) for name, value in floats[0].packed.rest.items())


def test_latent_weights_of_a_moving_average_are_the_average(train_member):
    member = train_member(
        quantizer={"name": "none", "start_step": None}, averager={"name": "sma", "params": {"start": 1}}
    )
    latent = read_latent(member, print)
    assert all(torch.equal(latent.state[name], value) for name, value in member.packed.rest.items())


def test_checkpoints_that_are_gone_are_named(quantized, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(quantized[0].path, copy)
    shutil.rmtree(copy / "checkpoint")
    with pytest.raises(RunError, match="no checkpoint left"):
        read_latent(replace(quantized[0], path=copy), print)
