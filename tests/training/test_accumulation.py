"""A batch that is computed in parts: the gradients of the whole batch, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtdog.core.config import Config, config_hash
from qtdog.core.errors import ConfigError, Interrupted
from qtdog.core.progress import StopAfter
from qtdog.data.dataset import DomainSubset
from qtdog.data.known_datasets import RotatedDigits
from qtdog.objectives.base import OBJECTIVES, run_in_parts
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.loop import begin_step, update
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, no_health_check, run

REFUSED = {"arm", "ccfp", "fish", "miro", "mldg", "sagnet"}
TAKEN = sorted(set(OBJECTIVES) - REFUSED)


def needs(name: str) -> dict[str, Any]:
    return {"objective": {"name": name}} | ({"model": {"feature_layer": "context"}} if name == "arm" else {})


def gradients(config: Config, digits: RotatedDigits) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the loss of the first update, its gradients, and the statistics of batch norm after it."""
    components = build_components(config, digits)
    components.network.train()
    begin_step(components, 0)
    loss = update(components, components.batches.batch(0), 0)
    grads = [value.grad for value in components.network.parameters() if value.grad is not None]
    return loss, grads, list(components.network.buffers())


def configured(short_config: Callable[..., Config], n_parts: int, **changes: Any) -> Config:
    train = {"accumulate": n_parts} | changes.pop("train", {})
    model = {"freeze_bn": True} | changes.pop("model", {})
    return short_config(train=train, model=model, **changes)


@pytest.mark.parametrize(("name", "n_parts"), [*((name, 4) for name in TAKEN), ("erm", 2), ("coral", 2)])
def test_parts_have_the_gradients_of_the_whole_batch(
    name: str, n_parts: int, short_config: Callable[..., Config], digits: RotatedDigits
):
    whole_loss, whole, _ = gradients(configured(short_config, 1, **needs(name)), digits)
    loss, parts, _ = gradients(configured(short_config, n_parts, **needs(name)), digits)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-5, atol=1e-6)
    assert len(parts) == len(whole)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item() + 1e-7)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantizer": {"name": "lsq", "start_step": 0}},
        {"quantizer": {"name": "lsq", "start_step": 0}, "objective": {"name": "coral"}},
        {"step_rule": {"name": "sam"}},
        {"objective": {"label_smoothing": 0.1}},
        {"data": {"batch_size": 5}},
    ],
    ids=str,
)
def test_parts_of_quantized_smoothed_and_uneven_batches(
    changes: dict[str, Any], short_config: Callable[..., Config], digits: RotatedDigits
):
    _, whole, _ = gradients(configured(short_config, 1, **changes), digits)
    _, parts, _ = gradients(configured(short_config, 2, **changes), digits)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4 * other.abs().max().item() + 1e-7)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_objective_that_runs_the_network_itself_is_refused(
    name: str, short_config: Callable[..., Config], digits: RotatedDigits
):
    with pytest.raises(ConfigError, match="cannot cut it"):
        build_components(short_config(**needs(name), train={"accumulate": 2}), digits)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.norm(images)
        return features, self.head(features)


def test_statistics_of_batch_norm_move_once_per_part():
    """The second pass over a part, in the backward pass, would move them again."""
    images = torch.randn(9, 4)
    model, alone = Normed(), Normed()
    features, logits = run_in_parts(model, images, 2)
    (features.square().mean() + logits.square().mean()).backward()
    expected = [alone(images[index::2]) for index in range(2)]
    for values, position in ((features, 0), (logits, 1)):
        for index in range(2):
            torch.testing.assert_close(values[index::2], expected[index][position])
    assert model.norm.num_batches_tracked == 2
    for one, other in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(one, other)


def test_dropout_of_the_second_pass_is_that_of_the_first():
    images = torch.ones(8, 50, requires_grad=True)
    drop = nn.Dropout(0.5)
    features, _ = run_in_parts(lambda part: (drop(part), part), images, 4)
    features.sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad, features.detach())


def test_one_part_is_the_default_and_in_no_hash(short_config: Callable[..., Config]):
    assert config_hash(short_config(train={"accumulate": 1})) == config_hash(short_config())
    assert config_hash(short_config(train={"accumulate": 2})) != config_hash(short_config())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"batch_size": 2}, "train": {"accumulate": 3}}, "at most as many parts"),
        ({"quantizer": {"name": "lsq", "activation_bits": 8}, "train": {"accumulate": 2}}, "activation_bits"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes: dict[str, Any], said: str, short_config: Callable[..., Config]):
    with pytest.raises(ConfigError, match=said):
        short_config(**changes)


@pytest.mark.parametrize("name", ["erm", "coral"])
def test_a_resumed_run_in_parts_has_the_bytes_of_one_that_ran_through(
    name: str, short_config: Callable[..., Config], three_digits: DomainSubset, tmp_path: Path
):
    config = resolve(configured(short_config, 2, **needs(name)), three_digits)
    whole, stopped = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped")
    run(config, three_digits, whole, callbacks=RunCallbacks(make_health_check=no_health_check))
    with pytest.raises(Interrupted):
        run(config, three_digits, stopped, callbacks=RunCallbacks(StopAfter(3), make_health_check=no_health_check))
    run(config, three_digits, stopped, resume=True, callbacks=RunCallbacks(make_health_check=no_health_check))
    assert stopped.model_file.read_bytes() == whole.model_file.read_bytes()
