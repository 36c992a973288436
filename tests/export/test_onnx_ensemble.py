import dataclasses

import numpy as np
import pytest
import torch

from qtdog.core.errors import ConfigError
from qtdog.ensemble.cascade import run_cascade
from qtdog.ensemble.model import load_ensemble_model
from qtdog.ensemble.prediction import predict_from_logits
from qtdog.export.export import export
from qtdog.export.inference_module import ASKED, OUTPUTS
from qtdog.export.packed_source import PackedSource, read_packed_source
from qtdog.export.runtimes import open_packed_source, open_runtime
from qtdog.packing.ensemble_file import load_ensemble, save_ensemble


@pytest.fixture(scope="module")
def cascade(ensemble_file, photos) -> PackedSource:
    """Three members with a threshold that settles some of the images after each of them."""
    whole = read_packed_source(ensemble_file)
    model = load_ensemble_model(ensemble_file)
    with torch.no_grad():
        first = model.members[0](model.prepare(torch.from_numpy(photos.pixels)))
    sure = (first / whole.temperature).softmax(1).amax(1)
    return dataclasses.replace(whole, threshold=sure.quantile(0.6).item())


def test_the_module_answers_as_predict_does_with_a_cascade(cascade, photos):
    model = load_ensemble_model(cascade.path)
    found = open_packed_source(cascade, 1)(photos.pixels)
    inputs = model.prepare(torch.from_numpy(photos.pixels))
    with torch.no_grad():
        groups = run_cascade(
            lambda k, part: model.members[k](part),
            3,
            inputs,
            threshold=cascade.threshold,
            temperature=cascade.temperature,
        )
    assert len(groups) >= 2
    for group in groups:
        places = group.indices.numpy()
        told = predict_from_logits(group.logits, cascade.temperature)
        assert (found[ASKED][places] == len(group.logits)).all()
        np.testing.assert_allclose(found["logits"][places], group.logits.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["probabilities"][places], told.probabilities, atol=1e-5)
        np.testing.assert_allclose(found["entropy"][places], told.uncertainty.entropy, atol=1e-5)
        if len(group.logits) > 1:
            np.testing.assert_allclose(
                found["mutual_information"][places], told.uncertainty.mutual_information, atol=1e-5
            )
        np.testing.assert_array_equal(found["agreement"][places], told.uncertainty.agreement)


def test_the_graph_stops_for_each_image_alone(cascade, photos, tmp_path):
    made = export(cascade, tmp_path / "m.onnx", "onnx", photos)
    assert made.info.outputs == (*OUTPUTS[True], ASKED)
    assert made.info.cascade_threshold == cascade.threshold
    parity = made.parity
    assert parity.same_members_frac == parity.agreement_frac == 1
    assert parity.members is not None
    assert 1 < parity.members[0] == parity.members[1] < 3
    file = open_runtime(made.path)
    together = file(photos.pixels)
    for index in range(0, len(photos.pixels), 5):
        alone = file(photos.pixels[index : index + 1])
        for name in made.info.outputs:
            np.testing.assert_allclose(alone[name][0], together[name][index], rtol=1e-4, atol=2e-5)


def test_an_ensemble_without_a_threshold_has_no_cascade(ensemble_file, packed, tmp_path):
    with pytest.raises(ConfigError, match="has no threshold for a cascade"):
        read_packed_source(ensemble_file, cascade=True)
    with pytest.raises(ConfigError, match="holds one model"):
        read_packed_source(packed("test_resnet"), cascade=True)
    whole = load_ensemble(ensemble_file)
    save_ensemble(tmp_path / "m.safetensors", whole.members, whole.about | {"cascade_threshold": 0.75})
    assert read_packed_source(tmp_path / "m.safetensors", cascade=True).threshold == 0.75
    assert read_packed_source(tmp_path / "m.safetensors").threshold is None
