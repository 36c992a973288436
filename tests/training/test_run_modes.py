"""The modes of a run, and the mistakes in its configuration that only show against the data."""

from __future__ import annotations

import json

import pytest
import torch

from qtdog.core.errors import ConfigError, DataError
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components, make_accelerator
from qtdog.training.checkpoint import latest_checkpoint
from qtdog.training.load_model import load_model
from qtdog.training.loop import begin_step, update
from qtdog.training.protocol import resolve
from qtdog.training.run import run


def test_in_domain_mode_reports_the_third_part_of_the_sources(tmp_path, short_config, digits):
    config = resolve(short_config(data={"target": "75", "test_mode": "in-domain", "batch_size": 8}), digits)
    result = run(config, digits, RunFolder(tmp_path))
    record = RunFolder(tmp_path).read_metrics()[-1]
    assert set(record.test) == {"0", "15", "30", "45", "60"}
    assert {score.n for score in record.test.values()} == {int(0.2 * 300), int(0.2 * 299)}
    assert result["test_accuracy"] == pytest.approx(sum(s.accuracy for s in record.test.values()) / 5, abs=0.5)


def test_without_a_target_everything_is_trained_on(tmp_path, short_config, digits):
    config = resolve(short_config(data={"target": "none", "batch_size": 8}), digits)
    result = run(config, digits, RunFolder(tmp_path))
    assert result["source_domains"] == list(digits.domains)
    assert result["test_accuracy"] is None
    assert load_model(tmp_path / "model.safetensors").info.target_domain is None


def test_selection_last_ships_the_last_checkpoint(tmp_path, short_config, digits):
    plan = {"steps": 6, "eval_every": 2, "selection": "last"}
    result = run(resolve(short_config(train=plan), digits), digits, RunFolder(tmp_path))
    assert result["selected_step"] == 6


def test_bf16_trains_and_what_is_measured_is_what_ships(tmp_path, short_config, digits):
    plan = {"steps": 4, "eval_every": 2, "precision": "bf16"}
    config = resolve(short_config(train=plan, quantizer={"start_step": 2}), digits)
    folder = RunFolder(tmp_path)
    run(config, digits, folder)  # raises if the file's float32 logits differ from the network's
    assert json.loads(folder.result_file.read_text())["selected_step"] == 4


def test_tensor_float_32_is_used_where_it_was_asked_for_and_nowhere_else(short_config):
    flags = []
    for precision in ("tf32", "fp32"):
        make_accelerator(short_config(train={"precision": precision}))
        flags.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
    assert flags == [(True, True), (False, False)]


def test_cudnn_picks_convolutions_as_it_is_asked_to(short_config, digits):
    flags = []
    for name in ("benchmark", "deterministic", "heuristic"):
        make_accelerator(short_config(train={"cudnn": name}))
        flags.append((torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic))
    assert flags == [(True, False), (False, True), (False, False)]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_code_of_an_update_is_the_one_that_was_asked_for(short_config, three_digits, optimizer):
    """Each makes the same updates but for rounding; the default is torch's choice."""
    ends = {}
    for code in ("auto", "loop", "foreach", "fused"):
        config = short_config(
            data={"target": "75", "batch_size": 4, "image_size": 8, "workers": 0},
            optimizer={"name": optimizer, "lr": 0.01, "implementation": code},
        )
        parts = build_components(config, three_digits)
        parts.network.train()
        (group, *_) = parts.optimizer.param_groups
        assert (group["foreach"], group["fused"]) == {
            "auto": (None, None), "loop": (False, None), "foreach": (True, None), "fused": (None, True)
        }[code]  # fmt: skip
        for step in range(2):
            begin_step(parts, step)
            update(parts, parts.batches.batch(step), step)
        ends[code] = torch.cat([value.detach().flatten() for value in parts.network.parameters()])
    assert torch.equal(ends["auto"], ends["loop"])
    for code in ("foreach", "fused"):
        torch.testing.assert_close(ends[code], ends["auto"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": {"target": "57"}}, ConfigError, r"unknown target domain '57'; did you mean '75'"),
        (
            {"data": {"content": "0" * 64}},
            DataError,
            "changed since this configuration was made .*Start a new run in another folder",
        ),
    ],
)
def test_resolve_refuses_what_does_not_fit_the_data(short_config, digits, changes, error, message):
    with pytest.raises(error, match=message):
        resolve(short_config(**changes), digits)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"objective": {"name": "emr"}}, "unknown objective 'emr'; did you mean 'erm'"),
        ({"step_rule": {"name": "plane"}}, "unknown step rule 'plane'; did you mean 'plain'"),
        ({"averager": {"name": "non"}}, "unknown averager 'non'; did you mean 'none'"),
        ({"quantizer": {"name": "lqs", "start_step": 2}}, "unknown quantizer 'lqs'; did you mean 'lsq'"),
        ({"quantizer": {"exclude": ["clasifier"], "start_step": 2}}, "classifier"),
        ({"optimizer": {"momentum": 0.9}}, "is for sgd"),
    ],
)
def test_unknown_names_on_an_axis(short_config, digits, section, message):
    config = resolve(short_config(**section), digits)
    with pytest.raises(ConfigError, match=message):
        build_components(config, digits)


def test_raw_step_sizes_train_with_sgd(tmp_path, short_config, digits):
    changes = {"optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9}}
    config = resolve(short_config(quantizer={"step_mode": "raw", "start_step": 2}, **changes), digits)
    folder = RunFolder(tmp_path)
    run(config, digits, folder)
    names = latest_checkpoint(folder.checkpoints, print)
    assert names is not None
    assert any(name.endswith(".scale") for name in names.tensors["network"])
