"""Two processes on the CPU (gloo) make the run that one makes, within what the order of additions allows.

Run by torchrun, this file makes what the tests compare (`main_of_two`): one start of two processes for all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtdog.api.experiment import Request, make_plan
from qtdog.cli.main import main
from qtdog.core.config_io import build_config, load_preset
from qtdog.data.known_datasets import RotatedDigits
from qtdog.objectives.base import OBJECTIVES
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.checkpoint import checkpoint_folders
from qtdog.training.evaluation import Evaluator
from qtdog.training.load_model import load_model
from qtdog.training.loop import begin_step, update
from qtdog.training.run import run

FLAGS = {"target": "75", "image_size": 8, "batch_size": 4, "steps": 6, "start_step": 3}
ADAPTS = FLAGS | {"image_size": 32, "steps": 2, "start_step": 1, "backbone": "test_resnet", "weights": "none"}
NAMES = ["erm", "irm", "vrex", "groupdro", "coral", "deep-coral", "mmd", "fishr", "rsc", "mms"]
PARAMS = {"irm": {"anneal_steps": 0}, "vrex": {"anneal_steps": 0}, "fishr": {"anneal_steps": 0, "weight": 10.0}}
DRAWN = ["arm", "mixup"]  # a context of the process's own images, pairs drawn by each process
N_STEPS = 3
AN_ERROR = "now an error"


def make(name: str, out: Path) -> None:
    """Make three updates and save the network, the objective's state and the losses."""
    changes = {
        "data": {"target": "75", "image_size": 8, "batch_size": 4},
        "objective": {"name": name, "params": PARAMS.get(name, {})},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "quantizer": {"name": "none"},
        "model": {"feature_layer": "context" if name == "arm" else "none"},
    }
    config, digits = build_config([load_preset("digits"), changes]), RotatedDigits()
    parts = build_components(config, digits)
    parts.network.train()
    losses = []
    for step in range(N_STEPS):
        begin_step(parts, step)
        losses.append(update(parts, parts.batches.batch(step), step).item())
    state = {f"network.{key}": value.contiguous() for key, value in parts.network.state_dict().items()}
    state |= {f"objective.{key}": value for key, value in parts.objective.state_dict().items()}
    if name in DRAWN:  # batch norm's statistics are each process's own until they are evaluated
        state = {key: value.detach().contiguous() for key, value in parts.network.named_parameters()}
        save_file(state, out / f"{name}.{parts.accelerator.process_index}.safetensors")
    elif parts.accelerator.is_main_process:
        save_file(state | {"losses": torch.tensor(losses)}, out / f"{name}.safetensors")


def train(flags: dict[str, Any], *more: str) -> object:
    """Run `qtdog train` in this process and return its exit code."""
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    sys.argv = ["qtdog", "train", *words, *more]
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


def main_of_two(out: Path) -> None:
    """Make in each of two processes what the tests below compare, and end with an error that both tell."""
    assert not train(FLAGS, "--set", "train.eval_every=2", "--out", str(out / "run"))
    assert not train(ADAPTS, "--set", "model.freeze_bn=false", "--out", str(out / "adapts"))
    for name in NAMES:
        make(name, out)
    for name in DRAWN:
        make(name, out)
    print(AN_ERROR, flush=True)
    assert train({"target": "74"})


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder that two processes filled, and what they said."""
    out = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, __file__, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


def test_two_processes_match_one(in_two, tmp_path):
    dataset, (planned,) = make_plan(Request(FLAGS, (), ["train.eval_every=2"], out=tmp_path / "one"))
    expected = run(planned.config, dataset, planned.folder)
    one, two = RunFolder(tmp_path / "one"), RunFolder(in_two[0] / "run")
    result = json.loads(two.result_file.read_text())
    assert result["config_hash"] == expected["config_hash"]
    assert result["selected_step"] == expected["selected_step"]
    for ours, theirs in zip(one.read_metrics(), two.read_metrics(), strict=True):
        assert ours.seen.step == theirs.seen.step
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)
        assert ours.seen.source_loss == pytest.approx(theirs.seen.source_loss, rel=1e-4)
    networks = [load_file(checkpoint_folders(folder.checkpoints)[-1] / "network.safetensors") for folder in (one, two)]
    assert networks[0].keys() == networks[1].keys()
    for name, ours in networks[0].items():
        torch.testing.assert_close(networks[1][name], ours, rtol=1e-3, atol=1e-4, msg=name)


def test_what_is_measured_with_batch_norm_that_adapts_is_what_ships(in_two):
    folder, digits = RunFolder(in_two[0] / "adapts"), RotatedDigits()
    config = folder.read_config()
    assert config is not None
    evaluate = build_components(config, digits).evaluate
    assert isinstance(evaluate, Evaluator)
    shipped = replace(evaluate, network=load_model(folder.model_file).network)
    told = folder.read_metrics()[-1].seen.source
    for domain, part in evaluate.protocol.selection_sets().items():
        assert shipped.score(part).loss == pytest.approx(told[domain].loss, rel=1e-6)


def test_only_the_first_process_speaks_and_an_error_of_any_is_told(in_two):
    _, done = in_two
    runs, _, behind = done.stdout.partition(AN_ERROR)
    assert runs.count("model  ") == 2  # of two runs
    assert behind.replace(AN_ERROR, "").strip() == ""
    told = [line for line in done.stderr.splitlines() if "error (process 1): " in line]
    assert len(told) == 1
    assert "75" in done.stderr.partition(told[0])[2] + told[0]


def test_every_objective_that_several_processes_share_is_compared():
    assert {*NAMES, *DRAWN} == {name for name in OBJECTIVES if not OBJECTIVES[name].ONE_PROCESS}


@pytest.mark.parametrize("name", DRAWN)
def test_two_processes_with_batches_of_their_own_keep_one_network(name, in_two):
    one, other = (load_file(in_two[0] / f"{name}.{rank}.safetensors") for rank in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_make_the_updates_of_one(name, in_two, tmp_path):
    make(name, tmp_path)
    one, two = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path, in_two[0]))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=3e-5, msg=lambda text, key=key: f"{key}: {text}")


if __name__ == "__main__":
    main_of_two(Path(sys.argv[1]))
