"""Whole runs on the embedded digits: what they leave behind, and that stopping them changes nothing."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from qtdog.conversion.attach import attached
from qtdog.core.config import config_hash
from qtdog.core.config_io import to_yaml
from qtdog.core.errors import Interrupted, ModelError, NonFiniteLossError, RunError
from qtdog.core.progress import StopAfter
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.checkpoint import latest_checkpoint
from qtdog.training.components import RunState
from qtdog.training.loop import TrainingRun, train, update
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run, train_in_folder


def file_hash(folder: RunFolder) -> str:
    return hashlib.sha256(folder.model_file.read_bytes()).hexdigest()


def test_a_run_leaves_a_whole_folder(tmp_path, short_config, digits):
    config = resolve(short_config(), digits)
    folder = RunFolder(tmp_path / "run")
    result = run(config, digits, folder)

    names = {entry.name for entry in folder.path.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "result.json", "checkpoint", "model.safetensors", ".lock"}
    assert folder.read_config() == config
    assert result["config_hash"] == config_hash(config)
    records = folder.read_metrics()
    assert [record.seen.step for record in records] == [2, 4, 6]
    assert [record.seen.selectable for record in records] == [False, True, True]
    for record in records:
        assert set(record.seen.source) == {"0", "15", "30", "45", "60"}
        assert record.test["75"].n == int((digits.domain_index == 5).sum())
        assert record.test_in["75"].n == record.test["75"].n - int(record.test["75"].n * 0.2)
    assert result["selected_step"] in (4, 6)
    assert result["size"]["bytes"] == folder.model_file.stat().st_size
    assert set(result["by_selection"]) == {"source", "last", "oracle"}
    assert {layer["bits"] for layer in result["layers"]} == {7}


def test_a_finished_run_is_not_made_again(tmp_path, short_config, digits):
    config = resolve(short_config(), digits)
    folder = RunFolder(tmp_path)
    first = run(config, digits, folder)
    stamp = folder.model_file.stat().st_mtime_ns
    assert run(config, digits, folder, resume=True) == first
    assert folder.model_file.stat().st_mtime_ns == stamp
    folder.result_file.write_text(json.dumps(first | {"classes": -1}))
    with pytest.raises(RunError, match=r"result\.json does not hold what a finished run writes: 'classes'.*--resume"):
        run(config, digits, folder, resume=True)


def test_same_seed_gives_the_same_file_and_another_seed_does_not(tmp_path, short_config, digits):
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = RunFolder(tmp_path / name)
        run(resolve(short_config(train={"steps": 6, "eval_every": 2, "seed": seed}), digits), digits, folder)
        hashes.append(file_hash(folder))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
@pytest.mark.parametrize("quantizer", [{"name": "lsq", "start_step": 2}, {"name": "none"}])
def test_interrupted_and_resumed_is_bit_identical(tmp_path, short_config, digits, stop_at, quantizer):
    config = resolve(short_config(quantizer=quantizer), digits)
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, digits, whole)

    with pytest.raises(Interrupted):
        run(config, digits, broken, callbacks=RunCallbacks(StopAfter(stop_at)))
    checkpoint = latest_checkpoint(broken.checkpoints, print)
    assert checkpoint is not None
    assert checkpoint.step == stop_at
    run(config, digits, broken, resume=True)

    assert file_hash(whole) == file_hash(broken)
    one, other = (latest_checkpoint(folder.checkpoints, print) for folder in (whole, broken))
    assert one is not None
    assert other is not None
    for part in ("network", "optimizer", "selected"):
        assert one.tensors[part].keys() == other.tensors[part].keys()
        assert all(torch.equal(value, other.tensors[part][key]) for key, value in one.tensors[part].items())
    assert whole.read_metrics() == broken.read_metrics()


def test_lost_newest_checkpoint_falls_back_and_ends_the_same(tmp_path, short_config, digits):
    config = resolve(short_config(), digits)
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    for folder in (whole, broken):
        run(config, digits, folder)
    newest = sorted(broken.checkpoints.iterdir())[-1]
    (newest / "network.safetensors").write_bytes(b"torn")
    broken.result_file.unlink()
    broken.model_file.unlink()
    warnings: list[str] = []
    run(config, digits, broken, resume=True, callbacks=RunCallbacks(warn=warnings.append))
    assert "broken" in warnings[0]
    assert file_hash(whole) == file_hash(broken)


def test_weights_and_step_sizes_move_and_optimizer_state_survives(short_config, digits):
    """The trap of the released research code: after the start its optimizer still held the old parameters."""
    config = resolve(short_config(), digits)
    parts = build_components(config, digits)
    assert parts.quantizer is not None
    params = {name: p for name, p in parts.network.named_parameters() if p.requires_grad}
    batches = {step: parts.batches.batch(step) for step in range(4)}
    for step in (0, 1):
        update(parts, batches[step], step)
    moments = {name: parts.optimizer.state[p]["exp_avg"] for name, p in params.items() if "scale" not in name}
    values = {name: moment.clone() for name, moment in moments.items()}
    parts.quantizer.enable()
    for name, moment in moments.items():
        assert parts.optimizer.state[params[name]]["exp_avg"] is moment, name
        assert torch.equal(moment, values[name]), name
    before = {name: p.detach().clone() for name, p in params.items()}
    update(parts, batches[2], 2)
    update(parts, batches[3], 3)
    for name, p in params.items():
        assert not torch.equal(p, before[name]), f"{name} did not move"
    step_sizes = [name for name in params if "scale" in name]
    assert len(step_sizes) == len(attached(parts.network).layers)


def test_float_and_quantized_run_are_the_same_until_the_start(tmp_path, short_config, digits):
    folders = []
    for quantizer in ({"name": "none"}, {"name": "lsq", "start_step": 4}):
        folder = RunFolder(tmp_path / quantizer["name"])
        run(resolve(short_config(quantizer=quantizer), digits), digits, folder)
        folders.append(folder)
    ours, theirs = (folder.read_metrics() for folder in folders)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert (one.seen.source, one.test, one.train_loss) == (other.seen.source, other.test, other.train_loss)
    assert ours[2].seen.source != theirs[2].seen.source


def test_nan_stops_with_advice_and_keeps_the_last_good_state(tmp_path, short_config, digits):
    config = resolve(short_config(), digits)
    folder = RunFolder(tmp_path)

    def poison(module, inputs, loss):
        return torch.full_like(loss, float("nan")) if inputs[1].step == 3 else None

    components = build_components(config, digits)
    components.objective.register_forward_hook(poison)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 4.*--lr 0\.0002"):
        train_in_folder(components, RunState(), folder, callbacks=RunCallbacks())
    checkpoint = latest_checkpoint(folder.checkpoints, print)
    assert checkpoint is not None
    assert checkpoint.step == 3
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.tensors["network"].values())


def test_nan_weights_are_never_written(tmp_path, short_config, digits):
    config = resolve(short_config(), digits)
    parts = build_components(config, digits)
    next(parts.network.parameters()).data.fill_(float("nan"))
    folder = RunFolder(tmp_path)
    with pytest.raises(NonFiniteLossError):
        train(TrainingRun(parts, RunState(), folder))
    assert latest_checkpoint(folder.checkpoints, print) is None


def test_a_folder_in_use_is_refused(tmp_path, short_config, digits):
    folder = RunFolder(tmp_path)
    with folder.lock(), pytest.raises(RunError, match=r"in use by process \d+"):
        run(resolve(short_config(), digits), digits, RunFolder(tmp_path))


def test_another_configuration_in_the_folder_is_refused(tmp_path, short_config, digits):
    folder = RunFolder(tmp_path)
    with pytest.raises(Interrupted):
        run(resolve(short_config(), digits), digits, folder, callbacks=RunCallbacks(StopAfter(1)))
    with pytest.raises(RunError, match=r"quantizer\.bits: 7 → 5"):
        run(resolve(short_config(quantizer={"bits": 5, "start_step": 2}), digits), digits, folder, resume=True)


@pytest.mark.parametrize("wrong", [{"backbone": "no_such_net"}, {"weights": "missing.safetensors"}])
def test_a_start_that_fails_leaves_a_folder_that_takes_another_configuration(tmp_path, short_config, digits, wrong):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ModelError):
        run(resolve(short_config(model=wrong), digits), digits, folder)
    assert folder.read_config() is None
    config = resolve(short_config(), digits)
    run(config, digits, folder)
    assert folder.read_config() == config


def test_a_folder_with_nothing_but_a_configuration_is_taken_over(tmp_path, short_config, digits):
    folder, config = RunFolder(tmp_path), resolve(short_config(), digits)
    folder.claim(resolve(short_config(quantizer={"bits": 5, "start_step": 2}), digits), resume=False)
    assert run(config, digits, folder)["config_hash"] == config_hash(config)
    assert folder.read_config() == config


def test_an_unfinished_run_needs_resume_and_foreign_files_are_left_alone(tmp_path, short_config, digits):
    config = resolve(short_config(), digits)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(Interrupted):
        run(config, digits, folder, callbacks=RunCallbacks(StopAfter(1)))
    with pytest.raises(RunError, match="--resume"):
        run(config, digits, folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"holds no run \(found thesis\.tex\)"):
        run(config, digits, RunFolder(tmp_path / "thesis"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        run(config, digits, RunFolder(tmp_path / "file"))


FLOAT = {"train": {"steps": 2, "eval_every": 2}, "quantizer": {"name": "none"}}


@pytest.mark.parametrize("damage", ["empty", "flip", "missing"])
def test_a_finished_run_whose_model_is_damaged_is_finished_again(tmp_path, short_config, digits, damage):
    config, folder = short_config(**FLOAT), RunFolder(tmp_path / "run")
    run(config, digits, folder)
    content = folder.model_file.read_bytes()
    if damage == "missing":
        folder.model_file.unlink()
    else:
        folder.model_file.write_bytes(b"" if damage == "empty" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError, match=r"model\.safetensors.*add --resume"):
        run(config, digits, folder)
    warnings: list[str] = []
    run(config, digits, folder, resume=True, callbacks=RunCallbacks(warn=warnings.append))
    assert folder.model_file.read_bytes() == content
    assert "it is made again" in warnings[0]


def test_what_a_kill_left_in_a_run_folder_is_removed_by_the_next_start(tmp_path, short_config, digits):
    config, folder = short_config(**FLOAT), RunFolder(tmp_path / "run")
    for left in (folder.checkpoints / ".step-00000001.abcdefgh.tmp", folder.path / ".result.json.abcdefgh.tmp"):
        left.mkdir(parents=True)
        (left / "new").mkdir()
    folder.config_file.write_text(to_yaml(config))
    run(config, digits, folder)
    assert not list(folder.path.rglob("*.tmp"))
