"""Every registered objective in the training loop: quantized from the first step, stopped and resumed."""

from __future__ import annotations

import pytest
import torch

from qtdog.objectives.base import OBJECTIVES
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.checkpoint import flatten_optimizer, plain_names, save_state
from qtdog.training.components import Components, RunState
from qtdog.training.loop import begin_step, update
from qtdog.training.protocol import resolve
from qtdog.training.run import initial_state


def steps(parts: Components, first: int, last: int) -> list[float]:
    parts.network.train()
    losses = []
    for step in range(first, last):
        begin_step(parts, step)
        losses.append(update(parts, parts.batches.batch(step), step).item())
    return losses


def everything(parts: Components) -> dict[str, torch.Tensor]:
    """The state of a run as one flat table."""
    moments, _ = flatten_optimizer(parts.optimizer, plain_names(parts.network, parts.objective))
    tables = {"network": parts.network.state_dict(), "objective": parts.objective.state_dict(), "optimizer": moments}
    return {f"{table} {name}": value for table, values in tables.items() for name, value in values.items()}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_it_trains_quantized_and_resumes_bit_by_bit(tmp_path, short_config, digits, name):
    params = {"anneal_steps": 1} if "anneal_steps" in OBJECTIVES[name].HYPERPARAMETERS else {}
    quantizer = {"bits": 7, "start_step": 0}
    model = {"feature_layer": "context", "feature_params": {"width": 8}} if name == "arm" else {}
    changes = {"objective": {"name": name, "params": params}, "quantizer": quantizer, "model": model}
    config = resolve(short_config(**changes), digits)

    def parts() -> Components:
        return build_components(config, digits)

    whole = parts()
    start = {key: value.clone() for key, value in everything(whole).items()}
    losses = steps(whole, 0, 2)
    assert all(torch.isfinite(torch.tensor(losses)))
    for key, value in everything(whole).items():
        assert torch.isfinite(value).all(), key
        if key.startswith("network featurizer") and key.endswith(("original", "log_scale")):
            assert not torch.equal(value, start[key]), f"{key} did not move"

    folder = RunFolder(tmp_path)
    broken = parts()
    assert steps(broken, 0, 1) == losses[:1]
    save_state(broken, folder, RunState(step=1))
    resumed = parts()
    assert initial_state(resumed, folder, print).step == 1
    assert steps(resumed, 1, 2) == losses[1:]
    found, expected = everything(resumed), everything(whole)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
