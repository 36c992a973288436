"""A linear probe first: at the beginning the classifier alone trains."""

from __future__ import annotations

import pytest
import torch

from qtdog.core.errors import Interrupted
from qtdog.core.progress import StopAfter
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.loop import begin_step, update
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run

PROBE = 3


@pytest.fixture
def config(short_config, digits):
    def make(**sections):
        train = {"steps": 6, "eval_every": 2, "probe_steps": PROBE}
        return resolve(short_config(train=train, **sections), digits)

    return make


@pytest.mark.parametrize("step_rule", ["plain", "sam"])
@pytest.mark.parametrize("optimizer", [{"name": "adam"}, {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}])
def test_the_rest_neither_moves_nor_gathers_moments(config, digits, step_rule, optimizer):
    changes = {"step_rule": {"name": step_rule}, "optimizer": {"lr": 0.01} | optimizer}
    one = config(quantizer={"name": "lsq", "start_step": 1}, objective={"name": "miro"}, **changes)
    parts = build_components(one, digits)
    named = dict(parts.network.named_parameters()) | dict(parts.objective.named_parameters(prefix="objective"))
    trained = {name: value for name, value in named.items() if value.requires_grad}
    assert len(trained) > 8
    for step in range(PROBE + 1):
        begin_step(parts, step)
        before = {name: value.detach().clone() for name, value in trained.items()}
        update(parts, parts.batches.batch(step), step)
        moved = {name for name, value in trained.items() if not torch.equal(value, before[name])}
        with_state = {name for name, value in trained.items() if parts.optimizer.state.get(value)}
        expected = {name for name in trained if name.startswith("classifier.")} if step < PROBE else set(trained)
        assert moved == expected
        assert with_state == expected


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_run_stopped_around_the_end_of_the_probe_resumes_exactly(config, digits, tmp_path, stop_at):
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config(), digits, whole)
    with pytest.raises(Interrupted):
        run(config(), digits, broken, callbacks=RunCallbacks(StopAfter(stop_at)))
    run(config(), digits, broken, resume=True)
    assert whole.model_file.read_bytes() == broken.model_file.read_bytes()
