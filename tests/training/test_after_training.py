"""Whole runs whose quantizer works after training: what ships, what is measured, what the target cannot change."""

# attributes of modules and options that are not there are what is tested
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import dataclasses
import json
import signal

import numpy as np
import pytest
import torch

from qtdog.core.errors import Interrupted
from qtdog.core.files import sha256_file
from qtdog.core.progress import StopAfter
from qtdog.packing.packed_file import load_packed
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.evaluation import Evaluator
from qtdog.training.finalize import calibration_indices, quantize_after_training_
from qtdog.training.load_model import load_model
from qtdog.training.protocol import make_protocol, resolve
from qtdog.training.run import RunCallbacks, run

METHODS = ("rtn", "gptq", "obc")
PLAN = {"steps": 6, "eval_every": 3}


@pytest.fixture
def config_of(short_config, digits):
    def make(method: str, **changes):
        how = {"name": method, "bits": 4, "init": "mse", "start_step": None}
        how |= {"calibration_images": 50} if method in ("gptq", "obc") else {}
        return resolve(short_config(**({"train": PLAN, "quantizer": how} | changes)), digits)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_run_ships_codes_and_reports_what_the_file_measures(tmp_path, config_of, digits, method):
    folder = RunFolder(tmp_path)
    counted: list[tuple[int, int]] = []
    config = config_of(method)
    result = run(
        config, digits, folder, callbacks=RunCallbacks(quantizing=lambda done, total: counted.append((done, total)))
    )

    packed = load_packed(folder.model_file)
    assert len(packed.quantized) == 4
    assert {value.spec.bits for value in packed.quantized.values()} == {4}
    assert [record.seen.selectable for record in folder.read_metrics()] == [True, True]
    assert counted[-1][0] == counted[-1][1]

    parts = build_components(config, digits)
    shipped = load_model(folder.model_file)
    assert isinstance(parts.evaluate, Evaluator)
    measured = dataclasses.replace(parts.evaluate, network=shipped.network)(0, True, None, lambda: None)
    assert result["source_accuracy"] == measured.seen.source_accuracy
    assert result["test_accuracy"] == measured.test_accuracy
    assert result["by_selection"] == {
        "source": {
            "step": result["selected_step"],
            "source_accuracy": measured.seen.source_accuracy,
            "test_accuracy": measured.test_accuracy,
        }
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_result_tells_how_each_layer_came_to_its_codes(tmp_path, config_of, digits, method):
    folder = RunFolder(tmp_path)
    run(config_of(method), digits, folder)
    report = json.loads(folder.result_file.read_text())["after_training"]
    chosen = max(folder.read_metrics(), key=lambda record: (record.seen.source_accuracy, -record.seen.step))
    assert report["method"] == method
    assert report["init"] == "mse"
    assert report["n_images"] == (0 if method == "rtn" else 50)
    assert report["float"]["source_accuracy"] == chosen.seen.source_accuracy
    assert report["float"]["test_accuracy"] == chosen.test_accuracy
    assert [layer["name"] for layer in report["layers"]] == [f"featurizer.{i}" for i in (0, 3, 6, 9)]
    for layer in report["layers"]:
        assert layer["method"] == method
        assert (layer["error"] is None) == (method == "rtn")
        assert method == "rtn" or layer["error"] < layer["rounding_error"]


def test_training_is_that_of_a_float_run(tmp_path, config_of, digits):
    lines = []
    for method in ("none", "obc"):
        how = {"name": method, "start_step": None}
        folder = RunFolder(tmp_path / method)
        run(config_of(method, quantizer=how | ({"calibration_images": 8} if method == "obc" else {})), digits, folder)
        lines.append(folder.read_metrics())
    assert lines[0] == lines[1]


def test_an_average_is_quantized_too(tmp_path, config_of, digits):
    config = config_of("gptq", averager={"name": "sma", "params": {"start": 1}})
    result = run(config, digits, RunFolder(tmp_path))
    assert result["after_training"]["float"]["source_accuracy"] is not None
    assert len(load_packed(RunFolder(tmp_path).model_file).quantized) == 4


@pytest.mark.parametrize("stop_at", [1, 4])
def test_stopped_while_quantizing_and_resumed_gives_the_same_file(tmp_path, config_of, digits, stop_at):
    config = config_of("obc")
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, digits, whole)

    def stopping(done: int, total: int) -> None:
        if done == stop_at:
            raise Interrupted("stopped by SIGINT")

    with pytest.raises(Interrupted):
        run(config, digits, broken, callbacks=RunCallbacks(quantizing=stopping))
    assert not broken.model_file.exists()
    assert not broken.result_file.exists()
    run(config, digits, broken, resume=True, callbacks=RunCallbacks(StopAfter(1)))  # nothing is left to train
    assert sha256_file(whole.model_file) == sha256_file(broken.model_file)


def test_a_signal_while_quantizing_stops_the_run(tmp_path, config_of, digits):
    def signalled(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="--resume") as stopped:
        run(config_of("obc"), digits, RunFolder(tmp_path), callbacks=RunCallbacks(quantizing=signalled))
    assert stopped.value.exit_code == 128 + signal.SIGTERM


def test_neither_target_nor_held_out_images_are_looked_at(config_of, digits):
    """Both are replaced by noise: the codes stay the same, to the last one."""
    config = config_of("obc")
    protocol = make_protocol(config, digits)
    held_out = [*protocol.selection_sets().values(), digits.indices("75")]
    found = []
    for poison in (None, np.concatenate(held_out)):
        parts = build_components(config, digits)
        cache = parts.batches.cache
        if poison is not None:
            real = cache.gather
            noise = torch.randint(0, 256, cache.shape[1:], dtype=torch.uint8)
            bad = set(poison.tolist())

            def gather(indices, pool=None, real=real, noise=noise, bad=bad):
                images = real(indices, pool)
                for row, index in enumerate(indices):
                    if int(index) in bad:
                        images[row] = noise
                return images

            cache.gather = gather  # pyright: ignore[reportAttributeAccessIssue]
            assert not torch.equal(cache.gather(poison[:1]), real(poison[:1]))
        quantize_after_training_(parts, lambda: None, None)
        assert parts.quantizer is not None
        found.append({name: quantizer.state_dict() for name, quantizer in parts.quantizer.layers.items()})
    for name, state in found[0].items():
        assert torch.equal(state["codes"], found[1][name]["codes"])
        assert state["codes"].any()


def test_images_are_spread_evenly_and_come_from_the_pools_alone():
    pools = {"a": np.arange(100, 200), "b": np.arange(300, 304), "c": np.arange(500, 600)}
    chosen = calibration_indices(pools, 30, seed=3)
    counts = [int(np.isin(chosen, pool).sum()) for pool in pools.values()]
    assert counts == [13, 4, 13]
    assert len(set(chosen.tolist())) == 30
    assert np.array_equal(chosen, calibration_indices(pools, 30, seed=3))
    assert not np.array_equal(chosen, calibration_indices(pools, 30, seed=4))
    assert np.array_equal(chosen[:10], calibration_indices(pools, 10, seed=3))
    assert len(calibration_indices(pools, 10_000, seed=0)) == 204


def test_more_images_than_there_are_means_all_of_them(tmp_path, config_of, digits):
    how = {"name": "gptq", "bits": 4, "start_step": None, "calibration_images": 100_000}
    result = run(config_of("gptq", quantizer=how), digits, RunFolder(tmp_path))
    n_training = sum(round(0.8 * int((digits.domain_index == d).sum())) for d in range(5))
    assert abs(result["after_training"]["n_images"] - n_training) <= 5
