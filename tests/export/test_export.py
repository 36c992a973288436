# pyright: reportIndexIssue=false

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from torch import nn

from qtdog.core.errors import DataError, ModelError, RunError
from qtdog.ensemble.prediction import predict_images
from qtdog.export.export import export
from qtdog.export.formats import FORMATS
from qtdog.export.inference_module import OUTPUTS, InferenceModule
from qtdog.export.integer_weight import SAFE
from qtdog.export.packed_source import KEY, PackedSource, read_packed_source
from qtdog.export.parity import LabelledImages
from qtdog.export.runtimes import open_runtime
from qtdog.models.network import Network
from qtdog.training.load_model import load_model

SUFFIX = {"openvino": ".xml", "torch": ".pt2", "executorch": ".pte"}


def initializers(path) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


def optimized(path, folder) -> list[str]:
    """Operators that are left when onnxruntime has merged what it can."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options)
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_vit", "digits_cnn"])
def test_the_float_graph_holds_integers_and_answers_like_the_packed_model(backbone, source, exported):
    packed, made = source(backbone), exported(backbone, "onnx")
    assert made.parity.agreement_frac == 1
    assert made.parity.max_difference["logits"] <= 1e-4 * max(1, made.parity.largest_logit)
    onnx.checker.check_model(made.path, full_check=True)
    arrays = initializers(made.path)
    n_codes = sum(array.size for array in arrays.values() if array.dtype == np.int8)
    assert n_codes == sum(value.codes.numel() for value in packed.codes().values())
    assert not [node for node in onnx.load(made.path).graph.node if node.op_type == "BatchNormalization"]
    largest = max(array.size for array in arrays.values() if array.dtype == np.float32)
    assert largest < min(4000, n_codes)  # what is float are biases, step sizes, the classifier and positions


@pytest.mark.parametrize("options", [{"quantizer": "dorefa"}, {"granularity": "layer"}])
def test_other_grids_stay_integers_too(options, exported):
    made = exported("digits_cnn", "onnx", **options)
    assert made.parity.agreement_frac == 1
    assert any(array.dtype in (np.int8, np.uint8) and array.size > 500 for array in initializers(made.path).values())


def test_a_user_without_qtdog_can_run_the_file_on_any_number_of_images(exported, photos):
    made = exported("test_resnet", "onnx")
    session = onnxruntime.InferenceSession(str(made.path))
    told = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    assert told["classes"] == ["bird", "cat", "dog"]
    assert told["preprocessing"]["image_size"] == 32
    assert told["parity"]["n_images"] == len(photos.pixels)
    for n in (1, 5):
        outputs = session.run(["logits", "probabilities"], {"images": photos.pixels[:n]})
        logits, probabilities = (np.asarray(output) for output in outputs)
        assert logits.shape == probabilities.shape == (n, 3)
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert json.loads(made.path.with_name("m.onnx.json").read_text())["parity"] == told["parity"]


def test_image_files_get_the_class_that_predict_gives_them(source, exported, image_tree):
    packed, made = source("test_resnet"), exported("test_resnet", "onnx")
    files = sorted(image_tree.rglob("*.png"))[:9]
    expected = [row["class"] for row in predict_images(load_model(packed.path), files)]
    session = onnxruntime.InferenceSession(str(made.path))
    found = []
    for file in files:
        image = Image.open(file).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        (logits,) = session.run(["logits"], {"images": np.asarray(image)[None]})
        found.append(made.info.classes[int(np.asarray(logits).argmax())])
    assert found == expected
    assert len(set(found)) > 1


# warnings of executorch and of what it imports are not ours
EXECUTORCH = pytest.param("executorch", marks=pytest.mark.filterwarnings("ignore"))


@pytest.mark.parametrize("name", ["openvino", "torch", EXECUTORCH])
def test_the_other_float_formats_answer_alike(name, exported, photos):
    pytest.importorskip(name)
    made = exported("test_resnet", name)
    assert made.parity.agreement_frac == 1
    again = open_runtime(made.path)
    assert again.info.classes == ("bird", "cat", "dog")
    assert again.info.parity is not None
    assert again(photos.pixels[:3])["logits"].shape == (3, 3)


def test_the_integer_graph_is_merged_whole_and_never_saturates(exported, tmp_path):
    made = exported("test_resnet", "onnx-int8", n_calibration=16)
    assert made.info.calibration == {
        "domains": ["indoor", "night"],
        "n_images": 16,
        "method": "mse",
        "target_included": False,
    }
    arrays = initializers(made.path)
    weights = [array for name, array in arrays.items() if name.endswith(".weight.codes")]
    n_convolutions = sum(node.op_type == "Conv" for node in onnx.load(made.path).graph.node)
    assert len(weights) == n_convolutions > 5
    assert all(array.dtype == np.int8 and np.abs(array.astype(int)).max() <= SAFE for array in weights)
    # a bias whose scale is not that of input and weight is wrong, and keeps its convolution from being merged
    left = optimized(made.path, tmp_path)
    assert left.count("QLinearConv") == n_convolutions
    assert not {"Conv", "FusedConv"} & set(left)
    assert made.parity.agreement_frac > 0.85
    assert made.info.integer_products == (n_convolutions, n_convolutions + 1)  # the classifier stays float
    model = onnx.load(made.path)
    assert model.ir_version == 8  # onnxruntime 1.16 reads it
    taken = {name for node in model.graph.node for name in node.input}
    assert {entry.name for entry in model.graph.initializer} <= taken  # runtimes warn of every other one


def test_standardized_weights_become_integers_too(packed, photos, tmp_path):
    made = export(read_packed_source(packed("test_nfnet")), tmp_path / "m.onnx", "onnx-int8", photos, n_calibration=8)
    assert made.info.integer_products is not None
    n_integer, n_products = made.info.integer_products
    assert n_integer == n_products - 1 > 20
    assert "standardized weights were rounded again" in made.info.notes[-1]


def test_openvino_runs_the_integer_graph(exported):
    made = exported("test_resnet", "openvino-int8", n_calibration=16)
    assert made.parity.agreement_frac > 0.85
    executed = open_runtime(made.path).native.get_runtime_model()
    types = [op.get_rt_info()["runtimePrecision"].astype(str) for op in executed.get_ops()]
    assert types.count("u8") > 5


def test_eight_bit_weights_are_rounded_again_with_a_word(exported):
    # LSQ's start uses few of the 256 codes, all of them safe; this one uses all
    made = exported("digits_cnn", "onnx-int8", bits=8, init="minmax")
    assert "rounded again to 7 bits" in made.info.notes[0]


def test_an_ensemble_is_one_graph_that_knows_its_doubt(ensemble_file, photos, tmp_path):
    made = export(read_packed_source(ensemble_file), tmp_path / "m.onnx", "onnx", photos)
    assert made.info.n_members == 3
    assert set(made.parity.max_difference) == set(OUTPUTS[True])
    assert max(made.parity.max_difference.values()) < 1e-3
    graph = onnx.load(made.path).graph
    assert [one.name for one in graph.input] == ["images"]
    assert [one.name for one in graph.output] == list(OUTPUTS[True])


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_what_is_accepted_is_an_output_where_the_file_has_a_threshold(name, source, photos, tmp_path):
    packed = source("test_resnet", accept=0.7)
    made = export(packed, tmp_path / f"m{SUFFIX.get(name, '.onnx')}", name, photos)
    assert made.info.outputs == ("logits", "probabilities", "accept")
    assert (made.info.temperature, made.info.accept_threshold) == (30.0, 0.7)
    found = open_runtime(made.path)(photos.pixels)
    assert found["accept"].dtype == bool
    assert np.array_equal(found["accept"], found["probabilities"].max(1) >= 0.7)
    assert 0 < found["accept"].mean() < 1
    softer = torch.from_numpy(found["logits"] / 30).softmax(1).numpy()
    np.testing.assert_allclose(found["probabilities"], softer, atol=1e-6)


class _Broken(PackedSource):
    """A source whose module has an operator that ONNX lacks."""

    def module(self, *, float_activations: bool = False) -> InferenceModule:
        class Odd(nn.Module):
            def forward(self, x):
                return torch.special.bessel_j0(x.mean((2, 3)))

        network = Network(Odd(), nn.Linear(3, 3), freeze_bn=True)
        return InferenceModule([network], self.infos[0].preprocessing)


def test_an_operator_that_onnx_lacks_is_named_and_no_file_is_left(source, photos, tmp_path):
    whole = source("test_resnet")
    broken = _Broken(whole.path, whole.members, whole.infos)
    with pytest.raises(ModelError, match="bessel_j0"):
        export(broken, tmp_path / "m.onnx", "onnx", photos)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_answers_otherwise_is_refused_and_the_old_one_kept(source, photos, tmp_path, monkeypatch):
    other = source("test_resnet", seed=1)
    right = FORMATS["torch"]
    wrong = dataclasses.replace(right, save=lambda source, *rest: right.save(other, *rest))
    monkeypatch.setitem(FORMATS._members, "torch", wrong)
    (tmp_path / "m.pt2").write_text("before")
    with pytest.raises(RunError, match="does not answer like the packed model on 48 images: the same class on"):
        export(source("test_resnet"), tmp_path / "m.pt2", "torch", photos)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == "before"


def test_an_export_cut_off_between_its_files_leaves_none_of_two_exports(source, photos, tmp_path, monkeypatch):
    right, replace = FORMATS["torch"], Path.replace

    def save(source, graph, path, info):
        right.save(source, graph, path, info)
        path.with_suffix(".bin").write_text("after")

    def cut_off(file, target):
        if Path(target).name == "m.pt2":
            raise KeyboardInterrupt
        return replace(file, target)

    monkeypatch.setitem(FORMATS._members, "torch", dataclasses.replace(right, save=save))
    for name in ("m.pt2", "m.bin", "m.pt2.json"):
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(Path, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        export(source("digits_cnn"), tmp_path / "m.pt2", "torch", photos)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.bin", "after")]
    monkeypatch.setattr(Path, "replace", replace)
    export(source("digits_cnn"), tmp_path / "m.pt2", "torch", photos)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.pt2", "m.pt2.json"]


def test_openvino_reports_no_use_to_its_makers(source, photos, tmp_path):
    telemetry = pytest.importorskip("openvino_telemetry")
    export(source("digits_cnn"), tmp_path / "m.xml", "openvino", photos)
    assert not telemetry.Telemetry().consent


def test_a_float_model_has_nothing_to_compute_with_in_integers(source, photos, tmp_path):
    whole = source("test_resnet")
    state = whole.members[0]
    bare = PackedSource(whole.path, (dataclasses.replace(state, quantized={}),), whole.infos)
    with pytest.raises(ModelError, match="is a float model"):
        export(bare, tmp_path / "m.onnx", "onnx-int8", photos)


def test_too_few_images_are_refused(source, photos, tmp_path):
    one = LabelledImages(photos.pixels[:1], photos.labels[:1], photos.domains)
    with pytest.raises(DataError, match="at least 2"):
        export(source("test_resnet"), tmp_path / "m.onnx", "onnx", one)


@pytest.mark.parametrize("kind", ["onnx", "onnx-int8"])
def test_a_graph_tells_nothing_of_the_place_where_it_was_made(kind, exported):
    """No path and no line of a source file: they are of one machine, and change the bytes."""
    content = exported("test_resnet", kind, n_calibration=16).path.read_bytes()
    assert b".py" not in content
    assert b"qtdog/" not in content


@pytest.mark.parametrize(("backbone", "bits"), [("test_resnet", 8), ("test_efficientnet", 6)])
def test_trained_grids_are_the_ranges_of_the_integer_graph(backbone, bits, source, photos, tmp_path):
    packed = source(backbone, activations=bits)
    made = export(packed, tmp_path / "m.onnx", "onnx-int8", photos, n_calibration=8)
    assert made.parity.agreement_frac > 0.8
    arrays, nodes = initializers(made.path), onnx.load(made.path).graph.node
    makers = {output: node for node in nodes for output in node.output}
    grids = {float(np.float32(grid.scale)): grid for grid in packed.grids(0).values()}
    trained = 0
    for node in nodes:
        if node.op_type != "QuantizeLinear" or float(arrays[node.input[1]]) not in grids:
            continue
        grid = grids[float(arrays[node.input[1]])]
        trained += 1
        assert arrays[node.input[2]] == -grid.qmin
        if bits < 8:
            before = makers[node.input[0]]
            assert before.op_type == "Clip"
            low, high = (arrays[name] for name in before.input[1:])
            assert (low, high) == (np.float32(grid.qmin * grid.scale), np.float32(grid.qmax * grid.scale))
    # one activation of several layers has the widest of their grids
    assert trained >= 0.6 * len(grids)


@pytest.mark.stress
def test_float_graphs_round_activations_as_trained(source, photos, tmp_path):
    packed = source("test_efficientnet", activations=6)
    made = export(packed, tmp_path / "m.onnx", "onnx", photos)
    assert made.parity.agreement_frac > 0.9
    assert sum(node.op_type == "Round" for node in onnx.load(made.path).graph.node) == len(packed.grids(0))
