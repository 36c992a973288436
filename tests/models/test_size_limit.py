"""Opening a small file takes little memory and time, whatever network and image size it names."""

# attributes of modules and options that are not there are what is tested
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import json
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from qtdog.conversion.save import save
from qtdog.core.errors import FormatError, ModelError
from qtdog.ensemble.model import load
from qtdog.export.packed_source import read_packed_source
from qtdog.models.backbones import create_network
from qtdog.models.network import to_device_
from qtdog.packing.ensemble_file import save_ensemble
from qtdog.packing.packed_file import PackedModel, load_packed

MAX_GROWTH_KIB = 100_000


@pytest.fixture
def hostile(tmp_path):
    """A small sound file that names a backbone of four gigabytes."""
    network = create_network(
        "digits_cnn", n_classes=3, channels=3, image_size=28, weights="none", freeze_bn=True, seed=0
    )
    told = {
        "backbone": "vit_giant_patch14_224",
        "classes": ["a", "b", "c"],
        "preprocessing": {"image_size": 224, "channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3},
        "source_domains": ["x"],
        "target_domain": None,
        "accuracy": {},
        "pretraining": "none",
        "bits": None,
        "step": 0,
        "config_hash": "0",
    }
    save(network, tmp_path / "model.safetensors", metadata=told)
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("use", [load, lambda path: read_packed_source(path).module()])
def test_a_file_that_names_a_huge_network_is_refused_before_memory_is_taken(hostile, use):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="does not fit: it holds"):
        use(hostile)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB


def pack(folder, network, **changes):
    """Write a network with a description that differs from it by `changes`."""
    described = {
        "backbone": "mnist_cnn",
        "classes": ["a", "b", "c"],
        "preprocessing": {"image_size": 28, "channels": 1, "mean": [0.0], "std": [1.0]},
        "source_domains": ["x"],
        "target_domain": None,
        "accuracy": {},
        "pretraining": "none",
        "bits": None,
        "step": 0,
        "config_hash": "0",
    }
    save(network, folder / "model.safetensors", metadata=described | changes)
    return folder / "model.safetensors"


def mnist_cnn():
    return create_network(
        "mnist_cnn", n_classes=3, channels=1, image_size=28, weights="none", freeze_bn=True, seed=0
    ).eval()


def test_loading_runs_no_image_of_the_size_that_the_file_names(tmp_path):
    network = mnist_cnn()
    how = {"image_size": 1024, "channels": 1, "mean": [0.0], "std": [1.0]}
    file = pack(tmp_path, network, preprocessing=how)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = load(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB  # one map alone takes 268 MB
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(loaded(images), to_device_(network, torch.device("cpu"))(images))


def test_a_classifier_that_the_features_do_not_fit_is_refused(tmp_path):
    network = mnist_cnn()
    network.classifier = nn.Linear(64, 3)
    with pytest.raises(ModelError, match="does not fit the network that it names"):
        load(pack(tmp_path, network))


def test_a_feature_layer_for_training_alone_is_refused(tmp_path):
    with pytest.raises(FormatError, match="'mixstyle' is for training only"):
        load(pack(tmp_path, mnist_cnn(), feature_layer="mixstyle"))


def test_files_are_opened_by_several_threads_at_once(hostile, tmp_path):
    (tmp_path / "sound").mkdir()
    sound = pack(tmp_path / "sound", mnist_cnn())

    def attempt(index):
        try:
            return type(load(hostile if index % 2 else sound)).__name__
        except ModelError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(attempt, range(8)))
    assert found[::2] == ["LoadedModel"] * 4
    assert all("does not fit: it holds" in text for text in found[1::2])


def test_members_share_what_the_file_stores_once(tmp_path):
    networks = [mnist_cnn() for _ in range(20)]
    packed = [PackedModel({}, dict(network.state_dict()), {"step": index}) for index, network in enumerate(networks)]
    for index, member in enumerate(packed):
        member.rest["classifier.bias"] = torch.full((3,), float(index))
    first = json.loads(json.dumps(load_packed(pack(tmp_path, networks[0])).metadata))
    for index, member in enumerate(packed):
        member.metadata.update(first | {"step": index})
    about = {"kind": "ensemble", "accuracy": {}, "training_steps": 1, "training_runs": 1.0}
    save_ensemble(tmp_path / "ensemble.safetensors", packed, about)
    model = load(tmp_path / "ensemble.safetensors")
    parameters = [dict(member.named_parameters()) for member in model.members]
    assert all(other["featurizer.0.weight"] is parameters[0]["featurizer.0.weight"] for other in parameters)
    assert [other["classifier.bias"][0].item() for other in parameters] == list(range(20))
    distinct = {id(parameter) for member in parameters for parameter in member.values()}
    assert len(distinct) == len(parameters[0]) + 19
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(model.member_logits(images)[7], model.member_logits(images)[0] + 7)
