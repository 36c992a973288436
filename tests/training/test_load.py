"""What a model file says of itself is checked like any input."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from qtdog.conversion.attach import attach
from qtdog.conversion.save import save
from qtdog.core.errors import ModelError
from qtdog.models.backbones import create_network, known_name
from qtdog.models.weights import read_weight_file
from qtdog.packing.packed_file import save_packed
from qtdog.training.load_model import ModelInfo, Preprocessing, empty_network, load_model, read_any_weights


@pytest.mark.parametrize("wrong", [0.0, -0.2, float("nan"), float("inf")])
def test_a_standard_deviation_that_cannot_be_divided_by_is_refused(wrong):
    with pytest.raises(ValidationError, match=r"std\.1"):
        Preprocessing(image_size=8, channels=3, mean=(0.5, 0.5, 0.5), std=(0.5, wrong, 0.5))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_mean_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValidationError, match=r"mean\.0"):
        Preprocessing(image_size=8, channels=1, mean=(wrong,), std=(0.5,))


def network(weights: str, n_classes: int = 3, **options):
    setting = {"channels": 1, "image_size": 28, "freeze_bn": True, "seed": 0}
    return create_network("digits_cnn", n_classes=n_classes, weights=weights, **setting, **options)


def test_a_packed_file_is_a_warm_start_of_other_classes(tmp_path):
    trained = network("none")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    attach(trained, bits=5, exclude=["classifier"]).enable()
    path = tmp_path / "model.safetensors"
    save(trained, path)
    warm = network(str(path), n_classes=5, read_weights=read_any_weights)
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(warm.eval().featurizer(images), trained.eval().featurizer(images))
    assert warm.pretraining.startswith("file model.safetensors sha256:")


def test_other_weight_files_are_read_as_before(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(2)}, path)
    assert read_any_weights(path).keys() == read_weight_file(path).keys()
    with pytest.raises(ModelError, match="does not exist"):
        read_any_weights(tmp_path / "no.safetensors")


def test_a_file_outlives_the_tag_of_its_weights_but_not_its_architecture():
    how = Preprocessing(image_size=32, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    rest = {"source_domains": (), "target_domain": None, "accuracy": {}, "pretraining": "", "bits": 7, "step": 1}
    info = ModelInfo(backbone="resnet18.gone_in_2031", classes=("a", "b"), preprocessing=how, config_hash="", **rest)
    assert known_name(info.backbone) == "resnet18"
    with torch.device("meta"):
        assert empty_network(info, n_features=512).classifier.out_features == 2
    gone = info.model_copy(update={"backbone": "resnet18x_of_2031"})
    with pytest.raises(ModelError, match=r"every model of timm \d+\.\d+"):
        empty_network(gone, n_features=512)


def test_an_unknown_backbone_names_the_timm_that_wrote_the_file(tmp_path):
    """A file that names an architecture of another timm says which version reads it."""
    info = {
        "backbone": "a_network_of_the_future",
        "classes": ["a", "b"],
        "preprocessing": {"image_size": 32, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3},
        "source_domains": ["x"],
        "target_domain": None,
        "accuracy": {"source": None, "test": None},
        "pretraining": "none",
        "bits": None,
        "step": 1,
        "config_hash": "0" * 12,
        "timm": "99.1",
    }
    save_packed(tmp_path / "model.safetensors", {}, {"classifier.weight": torch.ones(2, 4)}, info)
    with pytest.raises(ModelError, match=r"written with timm 99\.1, here is \d"):
        load_model(tmp_path / "model.safetensors")
