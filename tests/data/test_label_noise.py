from __future__ import annotations

import numpy as np
import pytest

from qtdog.core.config_io import build_config
from qtdog.core.errors import ConfigError
from qtdog.data.splits import with_wrong_labels
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.protocol import make_protocol, resolve, run_labels
from qtdog.training.run import run

POOLS = {"a": np.arange(0, 200), "b": np.arange(300, 400)}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_exactly_a_share_of_each_pool_is_wrong_and_evenly_so(share):
    labels = np.arange(500) % 5
    noisy = with_wrong_labels(labels, POOLS, share, n_classes=5, seed=3)
    wrong = noisy != labels
    assert [wrong[pool].sum() for pool in POOLS.values()] == [round(share * 200), round(share * 100)]
    assert not wrong[200:300].any()
    assert not wrong[400:].any()
    assert set(np.unique(noisy)) == set(range(5))
    if share:
        shift = np.bincount((noisy - labels)[wrong] % 5, minlength=5)
        assert shift[0] == 0
        assert (shift[1:] > 0).all()


def test_fewer_wrong_labels_are_a_part_of_more():
    labels = np.arange(500) % 5
    few, more = (with_wrong_labels(labels, POOLS, share, n_classes=5, seed=3) for share in (0.2, 0.4))
    wrong = few != labels
    assert (more[wrong] == few[wrong]).all()
    other = with_wrong_labels(labels, POOLS, 0.2, n_classes=5, seed=4)
    assert (other != few).any()


@pytest.mark.parametrize("validation", [False, True])
def test_only_source_labels_are_wrong_and_validation_by_choice(short_config, digits, validation):
    data = {"target": "75", "label_noise": 0.4, "label_noise_validation": validation}
    config = resolve(short_config(data=data), digits)
    protocol = make_protocol(config, digits)
    labels, right = run_labels(config, protocol, digits), digits.class_index
    assert (labels.training != right)[digits.indices("75")].sum() == 0
    assert (labels.evaluation != right)[digits.indices("75")].sum() == 0
    for domain in protocol.sources:
        train, heldout = protocol.splits[domain].train, protocol.splits[domain].heldout
        assert (labels.training != right)[train].sum() == round(0.4 * len(train))
        assert (labels.evaluation != right)[train].sum() == 0
        assert (labels.evaluation != right)[heldout].sum() == (round(0.4 * len(heldout)) if validation else 0)
    parts = build_components(config, digits)
    assert (parts.batches.class_index == labels.training).all()
    assert (parts.inputs.class_index == labels.evaluation).all()
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 9})})
    assert (run_labels(other, protocol, digits).training == labels.training).all()


def test_a_choice_that_does_nothing_is_refused():
    with pytest.raises(ConfigError, match="label_noise_validation"):
        build_config([{"data": {"label_noise_validation": True}}])


def test_a_run_on_wrong_labels_ends(short_config, digits, tmp_path):
    config = resolve(short_config(data={"label_noise": 0.5}), digits)
    assert run(config, digits, RunFolder(tmp_path))["test_accuracy"] is not None
