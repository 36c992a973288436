import pytest
import torch
from torch import nn

from qtdog.ensemble.prediction import predict_from_logits
from qtdog.export.inference_module import OUTPUTS, InferenceModule
from qtdog.export.runtimes import open_runtime
from qtdog.models.network import Network
from qtdog.training.load_model import Preprocessing, load_model

HOW = Preprocessing(image_size=8, channels=3, mean=(0.2, 0.4, 0.6), std=(0.3, 0.5, 0.7))


def members(n: int, sharpness: float) -> list[Network]:
    torch.manual_seed(0)
    networks = [Network(nn.Flatten(), nn.Linear(48, 4), freeze_bn=True).eval() for _ in range(n)]
    for network in networks:
        network.classifier.weight.data *= sharpness
    return networks


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_graph_says_of_an_ensemble_what_predict_says(sharpness, temperature):
    images = torch.randint(0, 256, (20, 4, 4, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    networks = members(3, sharpness)
    outputs = dict(zip(OUTPUTS[True], InferenceModule(networks, HOW, temperature)(images), strict=True))
    inputs = ((images / 255 - torch.tensor(HOW.mean)) / torch.tensor(HOW.std)).permute(0, 3, 1, 2)
    logits = torch.stack([network(inputs) for network in networks])
    expected = predict_from_logits(logits, temperature)
    torch.testing.assert_close(outputs["logits"], logits.mean(0))
    torch.testing.assert_close(outputs["probabilities"], expected.probabilities)
    for name in ("entropy", "mutual_information"):
        torch.testing.assert_close(outputs[name], getattr(expected.uncertainty, name), atol=2e-6, rtol=1e-4)
    assert torch.equal(outputs["agreement"], expected.uncertainty.agreement)


def test_a_packed_file_opened_as_a_runtime_answers_as_load_does(packed, photos):
    path = packed("test_resnet")
    model = load_model(path)
    found = open_runtime(path)(photos.pixels)
    pixels = torch.from_numpy(photos.pixels)
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(found["logits"]), model(model.prepare(pixels)))
        assert torch.equal(torch.from_numpy(found["probabilities"]), model.probabilities(pixels))
