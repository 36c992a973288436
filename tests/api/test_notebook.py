"""`qtdog.train`, its results and `qtdog.load`, as a notebook has them."""

# attributes of modules and options that are not there are what is tested
# pyright: reportArgumentType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import qtdog
from qtdog.core.config_io import option_tree
from qtdog.core.errors import ConfigError, DataError, FormatError, RunError
from qtdog.core.progress import StopAfter

SMALL: dict[str, Any] = {"steps": 4, "batch_size": 4, "image_size": 12, "eval_every": 2, "progress": False}
NET: dict[str, Any] = {"backbone": "digits_cnn", "weights": "none", **SMALL}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> qtdog.RunResult:
    out = tmp_path_factory.mktemp("one") / "run"
    found = qtdog.train(target="75", preset=("digits", "lsq"), bits=5, out=out, **SMALL)
    assert isinstance(found, qtdog.RunResult)
    return found


def test_a_result_says_what_was_measured(result: qtdog.RunResult):
    assert result.accuracy == result.result["test_accuracy"]
    assert result.target == "75"
    assert result.config.quantizer.bits == 5
    assert list(result.table()["step"]) == [2, 4]
    assert f"accuracy {100 * (result.accuracy or 0):.1f} %" in repr(result)
    assert "<table" in (result._repr_html_() or "")
    assert qtdog.RunResult.read(str(result.folder)).summary() == result.summary()


def test_a_result_draws_its_curves(result: qtdog.RunResult, tmp_path: Path):
    figure = result.plot(tmp_path / "pictures" / "curves.png")
    assert [axis.get_title() for axis in figure.axes] == ["unseen domain: 75"]
    with Image.open(tmp_path / "pictures" / "curves.png") as picture:
        assert picture.width > 300


def test_the_model_predicts_images_of_any_kind_alike(result: qtdog.RunResult, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    model = qtdog.load(str(result.folder))
    found = model.predict([tmp_path / "a.png", str(tmp_path), Image.fromarray(pixels), pixels, pixels[:, :, None]])
    assert len(found) == 5
    assert found.probabilities.shape == (5, 10)
    assert np.array_equal(found.probabilities, found.probabilities[:1].repeat(5, 0))
    assert found.inputs == (str(tmp_path / "a.png"), str(tmp_path / "a.png"), "2", "3", "4")
    assert set(found.classes) <= set(model.classes)
    assert list(found.table().columns)[:3] == ["image", "class", "probability"]
    assert model.predict(torch.from_numpy(pixels)).probabilities == pytest.approx(found.probabilities[:1])
    with pytest.raises(DataError, match=r"uint8 \(H, W\)"):
        model.predict(pixels.astype(np.float32))


def test_the_model_scores_a_data_set_as_training_did(result: qtdog.RunResult):
    scores = result.model.evaluate("rotated-digits", progress=False)
    assert scores.domains["75"]["accuracy"] == result.accuracy
    assert list(scores.table()["trained_on"]) == [True] * 5 + [False]


@pytest.mark.usefixtures("one_registry")
def test_the_model_is_exported(result: qtdog.RunResult, tmp_path: Path):
    made = result.model.export(tmp_path / "m.onnx", num_check=20, progress=False)
    assert made.path == tmp_path / "m.onnx"
    assert made.parity.agreement_frac == 1


def test_several_targets_and_members_give_several_results(tmp_path: Path):
    images = [np.full((12, 12, 3), 20 * i, dtype=np.uint8) for i in range(12)]
    domains, labels = ["x", "y"] * 6, ["cat", "cat", "dog", "dog"] * 3
    data = qtdog.Dataset(images, domains, labels=labels, name="tiny")
    found = qtdog.train(data, "all", out=tmp_path, members=2, fork_at="start", **NET)
    assert isinstance(found, qtdog.RunResults)
    assert [(run.target, run.config.train.seed) for run in found] == [("x", 0), ("x", 1), ("y", 0), ("y", 1)]
    assert [one.target for one in found.ensembles] == ["x", "y"]
    accuracies = [one.accuracy or 0.0 for one in found.ensembles]
    assert found.accuracy == pytest.approx(sum(accuracies) / 2)
    assert len(found.table()) == 6
    with pytest.raises(RunError, match="2 models"):
        _ = found.model
    assert len(found.ensembles[0].model.predict(images).mutual_information) == 12
    assert found[0].config.data.source == "python:tiny"
    assert found[0].result["dataset"] == "tiny"


def test_a_wrong_option_is_refused_with_the_nearest_one(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown option 'step'; did you mean 'steps'"):
        qtdog.train(target="75", step=4)
    with pytest.raises(ConfigError, match="unknown quantizer 'lsk'; did you mean 'lsq'"):
        qtdog.train(target="75", quantizer="lsk", out=tmp_path / "run", **SMALL)
    with pytest.raises(ConfigError, match=r"'params' is an option of several sections: say objective\.params or"):
        option_tree({"params": {}})
    with pytest.raises(ConfigError, match=r"option in 'train' 'stepz'; did you mean 'steps'"):
        qtdog.Config.make(train={"stepz": 3})


def test_ctrl_c_is_a_keyboard_interrupt_after_the_checkpoint(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        qtdog.train(target="75", out=tmp_path / "run", **SMALL | {"progress": StopAfter(3)})
    assert (tmp_path / "run" / "checkpoint" / "step-00000003").is_dir()
    steps = []
    resumed = qtdog.train(
        out=tmp_path / "run", resume=True, progress=lambda step, last, loss: steps.append((step, last))
    )
    assert steps == [(4, 4)]
    assert isinstance(resumed, qtdog.RunResult)


def test_an_unfinished_run_has_no_model_and_a_folder_of_runs_names_one(result: qtdog.RunResult, tmp_path: Path):
    with pytest.raises(FormatError, match=r"did you mean .*run/model\.safetensors"):
        qtdog.load(result.folder.parent)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(FormatError, match="not finished"):
        qtdog.load(tmp_path)


def test_a_configuration_is_made_saved_and_read(tmp_path: Path):
    config = qtdog.Config.make("lsq-sma", bits=4, train={"steps": 50, "eval_every": 10})
    config.save(tmp_path / "mine.yaml")
    assert qtdog.Config.read(str(tmp_path / "mine.yaml")) == config
    assert (config.quantizer.bits, config.averager.name, config.train.steps) == (4, "sma", 50)


def test_a_torchvision_data_set_becomes_domains():
    from torchvision.datasets import FakeData

    data = qtdog.Dataset({"a": FakeData(4, (3, 8, 8), 2), "b": FakeData(3, (3, 8, 8), 2)}, classes=["cat", "dog"])
    assert (len(data), data.domains, data.card.channels) == (7, ("a", "b"), 3)
    rows = [{"image": Image.new("L", (8, 8)), "label": k % 2, "site": "north" if k < 2 else "south"} for k in range(4)]
    table = qtdog.Dataset(rows, "site", classes=["cat", "dog"])
    assert (table.domains, table.classes, table.card.channels) == (("north", "south"), ("cat", "dog"), 1)
    with pytest.raises(DataError, match="unknown key of the samples 'sit'; did you mean 'site'"):
        qtdog.Dataset(rows, "sit")


def test_every_name_is_there():
    assert {"train", "load", "sweep", "Dataset"} <= set(dir(qtdog))
    assert all(getattr(qtdog, name) is not None for name in dir(qtdog) if not name.startswith("__"))
