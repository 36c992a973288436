"""The mean of weights, from run folders and as a pure function."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtdog.conversion.attach import attach
from qtdog.core.errors import ConfigError
from qtdog.ensemble.assemble import EnsembleSpec, assemble
from qtdog.ensemble.model import Member, read_member
from qtdog.ensemble.weight_averaging import average_weights, greedy, shipped_weights
from qtdog.runs.folder import RunFolder
from qtdog.training.checkpoint import latest_checkpoint
from qtdog.training.load_model import empty_network, load_model
from qtdog.training.shared_steps import latent_weights


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


def test_what_is_averaged_is_what_the_model_files_answer_with(quantized, floats, train_member):
    averaged = train_member(averager={"name": "sma", "params": {"start": 2}})
    for member in [*quantized, *floats, averaged]:
        network = empty_network(member.info)
        network.load_state_dict(shipped_weights(member))
        loaded = load_model(member.path / "model.safetensors")
        images = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(images), loaded(images))


def test_no_checkpoint_is_needed(quantized, tmp_path):
    for k, member in enumerate(quantized):
        shutil.copytree(member.path, tmp_path / f"{k}")
        shutil.rmtree(tmp_path / f"{k}" / "checkpoint")
    members = [read_member(tmp_path / f"{k}") for k in range(len(quantized))]
    for kind in ("diwa", "soup"):
        made, again = (tmp_path / name / "model.safetensors" for name in ("made", "again"))
        assemble(quantized, EnsembleSpec(kind, made))
        assemble(members, EnsembleSpec(kind, again))
        assert made.read_bytes() == again.read_bytes()


def behind_rounding(member: Member) -> dict[str, torch.Tensor]:
    """The float weights that a member's rounded ones come from: the analysis of rounding noise reads them."""
    checkpoint = latest_checkpoint(RunFolder(member.path).checkpoints, print)
    assert checkpoint is not None
    return latent_weights(checkpoint, member.config)


def test_what_lies_behind_the_rounding_gives_the_codes_of_the_file_again(quantized):
    for member in quantized:
        latent = behind_rounding(member)
        assert not latent.keys() ^ shipped_weights(member).keys()
        checkpoint = latest_checkpoint(RunFolder(member.path).checkpoints, print)
        assert checkpoint is not None
        network = empty_network(member.info)
        attach(network, bits=7, exclude=("classifier",)).set_enabled(True)
        network.load_state_dict(checkpoint.tensors["selected"])
        for name, value in member.packed.quantized.items():
            assert not torch.equal(latent[name], value.dequantize())
            module = network.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(getattr(module, "weight"), value.dequantize())  # noqa: B009
            assert torch.equal(module.parametrizations.weight.original, latent[name])  # pyright: ignore
        assert torch.equal(latent["classifier.weight"], member.packed.rest["classifier.weight"])


def test_nothing_lies_behind_float_weights_and_an_average_is_what_was_averaged(floats, train_member):
    averaged = train_member(
        quantizer={"name": "none", "start_step": None}, averager={"name": "sma", "params": {"start": 1}}
    )
    for member in (floats[0], averaged):
        latent = behind_rounding(member)
        assert all(torch.equal(latent[name], value) for name, value in member.packed.rest.items())
