"""`benchmarks/peers.py` at a tiny scale: both sides do the same work, and score one network alike."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qtdog
from support import load_script


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    return load_script("benchmarks/peers.py")


@pytest.fixture
def work(peers: ModuleType, tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for domain in ("ink", "photo", "sketch"):
        for label in ("cat", "dog"):
            folder = tmp_path / "all" / domain / label
            folder.mkdir(parents=True)
            for i in range(20):
                Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    folder = peers.copy_images(tmp_path / "all", tmp_path / "half", every=2)
    options = Namespace(target="photo", steps=3, eval_every=2, image_size=32, workers=0, threads=1)
    return peers.work_of(folder, options, 4) | {"backbone": "test_resnet.r160_in1k"}


def test_both_sides_do_the_same_work_and_score_a_network_alike(peers: ModuleType, work: dict[str, Any], tmp_path: Path):
    ours, theirs = peers.ours(work, tmp_path), peers.theirs(work, tmp_path)
    peers.check_same_work(ours, theirs)
    assert ours["n_seen"] == 3 * 2 * 4
    assert ours["n_measured"] == {"ink": 4, "sketch": 4, "photo": 20}
    assert len(ours["step_s"]) == len(theirs["step_s"]) == 1  # without the first and the one behind an evaluation
    assert len(ours["eval_s"]) == len(theirs["eval_s"]) == 2
    network = qtdog.load(tmp_path / "run")
    assert {domain: peers.accuracy(network, images, work) for domain, images in work["measure"].items()} == {
        domain: pytest.approx(score) for domain, score in ours["scores"].items()
    }


def test_different_work_is_refused(peers: ModuleType):
    done = {"n_seen": 24, "n_measured": {"ink": 4}, "pools": {"ink": "a"}}
    peers.check_same_work(done, dict(done))
    with pytest.raises(SystemExit, match=r"pools is .*'a'.* and .*'b'"):
        peers.check_same_work(done, done | {"pools": {"ink": "b"}})


def test_ratios_are_those_of_one_round(peers: ModuleType):
    base = {"eval_s": [1.0], "other_s": 1.0, "wall_s": 1.0, "long_s": 1.0, "cpu_s": 1.0, "peak_mb": 1.0}
    rounds = [
        {"ours": base | {"step_s": [1.0, 1.0, 9.0]}, "theirs": base | {"step_s": [2.0]}},
        {"ours": base | {"step_s": [10.0]}, "theirs": base | {"step_s": [40.0]}},
    ]
    row = peers.compare(rounds)["step_s"]
    assert row["ratio"] == [2.5, 3.0, 3.5]
    assert row["theirs"] == [11.5, 21.0, 30.5]
