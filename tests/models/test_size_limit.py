import resource

import pytest
import torch
from torch import nn

from qtdog.conversion.save import save
from qtdog.core.errors import ModelError
from qtdog.ensemble.model import load
from qtdog.export.source import read_subject
from qtdog.models.backbones import SPARE_VALUES, at_most, create_network

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


@pytest.mark.parametrize("use", [load, lambda path: read_subject(path).module()])
def test_a_file_that_names_a_huge_network_is_refused_before_memory_is_taken(hostile, use):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="does not fit: it holds"):
        use(hostile)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB


def test_buffers_count_and_the_bound_ends_with_the_block():
    with pytest.raises(ModelError, match="the file does not fit"), at_most(10, "the file"):
        nn.Module().register_buffer("table", torch.empty(SPARE_VALUES + 21))
    nn.Linear(2, SPARE_VALUES)
