import numpy as np
import pytest
import torch

from qtdog.ensemble.model import load_ensemble_model
from qtdog.ensemble.prediction import predict_from_logits
from qtdog.export.benchmark import BenchmarkPlan, bench
from qtdog.export.export import Exported, export
from qtdog.export.inference_module import OUTPUTS
from qtdog.export.packed_source import KEY, read_packed_source
from qtdog.export.runtimes import open_runtime

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def made(ensemble_file, photos, tmp_path_factory) -> Exported:
    """Three members as one graph."""
    return export(read_packed_source(ensemble_file), tmp_path_factory.mktemp("made") / "m.onnx", "onnx", photos)


def test_the_graph_answers_as_predict_does(made, ensemble_file, photos):
    model = load_ensemble_model(ensemble_file)
    with torch.no_grad():
        logits = model.member_logits(model.prepare(torch.from_numpy(photos.pixels)))
    expected = predict_from_logits(logits, model.info.temperature)
    found = open_runtime(made.path)(photos.pixels)
    assert tuple(found) == OUTPUTS[True]
    np.testing.assert_allclose(found["logits"], logits.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["probabilities"], expected.probabilities, atol=1e-5)
    np.testing.assert_allclose(found["entropy"], expected.uncertainty.entropy, atol=1e-5)
    np.testing.assert_allclose(found["mutual_information"], expected.uncertainty.mutual_information, atol=1e-5)
    np.testing.assert_array_equal(found["agreement"], expected.uncertainty.agreement)


def test_a_cascade_that_an_earlier_version_exported_still_answers_and_is_timed(made, photos, tmp_path):
    model = onnx.load(made.path)
    (shape,) = (node.name for node in model.graph.input)
    model.graph.node.append(onnx.helper.make_node("Shape", [shape], ["members"], start=0, end=1))
    model.graph.output.append(onnx.helper.make_tensor_value_info("members", onnx.TensorProto.INT64, [None]))
    about = made.info.model_dump(mode="json")
    about |= {"cascade_threshold": 0.75, "outputs": [*made.info.outputs, "members"]}
    entry = next(one for one in model.metadata_props if one.key == KEY)
    entry.value = made.info.model_validate(about).model_dump_json()[:-1] + ', "cascade_threshold": 0.75}'
    file = tmp_path / "m.onnx"
    onnx.save(model, file)
    found, expected = open_runtime(file)(photos.pixels), open_runtime(made.path)(photos.pixels)
    np.testing.assert_array_equal(found["logits"], expected["logits"])
    assert found["members"].tolist() == [len(photos.pixels)]
    row = bench([file], BenchmarkPlan(threads=1, n_rounds=1), images=lambda _: photos).rows[0]
    assert row.accuracy == (expected["logits"].argmax(1) == photos.labels).mean()
