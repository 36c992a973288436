"""Two processes on the CPU (gloo) make the run that one makes, within what the order of additions allows."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtdog.api.experiment import Request, make_plan
from qtdog.data.digits import RotatedDigits
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.checkpoint import checkpoint_folders
from qtdog.training.evaluation import Evaluator
from qtdog.training.load_model import load_model
from qtdog.training.run import run

STEPS, START = 6, 3
FLAGS = {"target": "75", "image_size": 8, "batch_size": 4, "steps": STEPS, "start_step": START}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_two_processes(out: Path, flags: dict[str, Any], *assigned: str) -> None:
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    words += [word for one in assigned for word in ("--set", one)]
    command = [*launch, "-m", "qtdog", "train", *words, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model  ") == 1  # only the first process speaks


def test_two_processes_match_one(tmp_path):
    dataset, (planned,) = make_plan(Request(FLAGS, (), ["train.eval_every=2"], out=tmp_path / "one"))
    expected = run(planned.config, dataset, planned.folder)
    in_two_processes(tmp_path / "two", FLAGS, "train.eval_every=2")
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
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


def test_what_is_measured_with_batch_norm_that_adapts_is_what_ships(tmp_path):
    flags = FLAGS | {"image_size": 32, "steps": 2, "start_step": 1, "backbone": "test_resnet", "weights": "none"}
    in_two_processes(tmp_path / "run", flags, "model.freeze_bn=false")
    folder, digits = RunFolder(tmp_path / "run"), RotatedDigits()
    config = folder.read_config()
    assert config is not None
    evaluate = build_components(config, digits).evaluate
    assert isinstance(evaluate, Evaluator)
    shipped = replace(evaluate, network=load_model(folder.model_file).network)
    told = folder.read_metrics()[-1].seen.source
    for domain, part in evaluate.protocol.selection_sets().items():
        assert shipped.score(part).loss == pytest.approx(told[domain].loss, rel=1e-6)


def test_an_error_of_any_process_is_told():
    environment = os.environ | {"RANK": "1"}
    words = [sys.executable, "-m", "qtdog", "train", "--target", "74"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    assert "error (process 1): " in done.stderr
    assert "75" in done.stderr
    assert not done.stdout
