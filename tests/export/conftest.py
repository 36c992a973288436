"""Small packed models with everything that an export must get right, made without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from qtdog.conversion.attach import activation_grids, attach, input_layers
from qtdog.conversion.save import save
from qtdog.export.export import Exported, export
from qtdog.export.formats import FORMATS
from qtdog.export.packed_source import PackedSource, read_packed_source
from qtdog.export.parity import LabelledImages
from qtdog.models.backbones import create_network, preprocessing
from qtdog.models.network import Network
from qtdog.packing.ensemble_file import save_ensemble
from qtdog.packing.packed_file import load_packed
from qtdog.quantizers.activations import ActivationQuantizer, quantize_inputs_

SIZE = 32
CLASSES = ("bird", "cat", "dog")


def settle_batch_norm_(network: Network, seed: int) -> None:
    """Give every batch norm statistics of its input, and factors of which some turn the sign and one is zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
            factors = 0.5 + torch.rand(module.weight.shape, generator=generator)
            factors[::5] *= -1
            factors[1] = 0
            module.weight.data = factors
            module.bias.data = torch.randn(factors.shape, generator=generator) * 0.2
            module.training = True
    with torch.no_grad():
        network(torch.randn(16, 3, SIZE, SIZE, generator=generator))
    network.eval()


def smooth_photos(seed: int) -> np.ndarray:
    """Return uint8 images (48, SIZE, SIZE, 3)."""
    coarse = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (48, 3, 4, 4))).float()
    fine = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear").permute(0, 2, 3, 1)
    return fine.to(torch.uint8).numpy()


def make_packed(
    path: Path,
    backbone: str,
    *,
    seed: int = 0,
    bits: int = 7,
    quantizer: str = "lsq",
    accept: float | None = None,
    activations: int = 0,
    **more: Any,
) -> Path:
    """Write a packed model with random weights, quantized, and return the file."""
    network = create_network(
        backbone, n_classes=3, channels=3, image_size=SIZE, weights="none", freeze_bn=True, seed=seed
    )
    settle_batch_norm_(network, seed)
    # far-apart logits, so that a rounding cannot change the class
    network.classifier.weight.data *= 30
    attach(network, bits=bits, quantizer=quantizer, exclude=["classifier"], **more).enable()
    if activations:
        for module in input_layers(network).values():
            quantize_inputs_(module, activations, "moving")
        for module in network.modules():
            if isinstance(module, ActivationQuantizer):
                module.train()
        with torch.no_grad():
            network(torch.from_numpy(smooth_photos(seed=5)).permute(0, 3, 1, 2).float() / 127.5 - 1)
        network.eval()
    mean, std = preprocessing(backbone, channels=3)
    told = {
        "backbone": backbone,
        "classes": list(CLASSES),
        "preprocessing": {"image_size": SIZE, "channels": 3, "mean": list(mean), "std": list(std)},
        "source_domains": ["indoor", "night"],
        "target_domain": "outdoor",
        "accuracy": {"source": None, "test": None},
        "pretraining": "none",
        "bits": bits,
        "step": seed,
        "config_hash": str(seed),
        "activations": {name: asdict(grid) for name, grid in activation_grids(network).items()},
    }
    if accept is not None:
        told |= {"temperature": 30.0, "accept_threshold": accept}
    path.parent.mkdir(parents=True, exist_ok=True)
    save(network, path, metadata=told)
    return path


@pytest.fixture(autouse=True, scope="session")
def _quick(one_registry: None) -> None:
    """Every export of these tests shares what does not depend on the model."""


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a packed model once for all tests."""
    made: dict[str, Path] = {}

    def make(backbone: str, **options: Any) -> Path:
        key = f"{backbone} {sorted(options.items())}"
        if key not in made:
            made[key] = make_packed(tmp_path_factory.mktemp("packed") / "model.safetensors", backbone, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def source(packed: Callable[..., Path]) -> Callable[..., PackedSource]:
    """Return a function that makes a packed model and reads it."""
    return lambda backbone, **options: read_packed_source(packed(backbone, **options))


@pytest.fixture(scope="session")
def exported(
    source: Callable[..., PackedSource], photos: LabelledImages, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Exported]:
    """Return a function that exports a packed model once for all tests: they read the file and leave it as it is."""
    made: dict[str, Exported] = {}

    def make(backbone: str, name: str, *, n_calibration: int = 16, **options: Any) -> Exported:
        key = f"{backbone} {name} {n_calibration} {sorted(options.items())}"
        if key not in made:
            out = tmp_path_factory.mktemp("exported") / f"m{FORMATS[name].suffix}"
            made[key] = export(source(backbone, **options), out, name, photos, n_calibration=n_calibration)
        return made[key]

    return make


@pytest.fixture(scope="session")
def ensemble_file(packed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three members in one file, with a temperature."""
    path = tmp_path_factory.mktemp("ensemble") / "model.safetensors"
    members = [load_packed(packed("test_resnet", seed=seed)) for seed in range(3)]
    none = {"source": None, "test": None}
    about = {"kind": "eoq", "accuracy": none, "training_steps": 0, "training_runs": 0.0, "temperature": 2.0}
    save_ensemble(path, members, about)
    return path


@pytest.fixture(scope="session")
def photos() -> LabelledImages:
    """Forty-eight images with smooth structure, and labels without meaning."""
    return LabelledImages(smooth_photos(seed=0), np.random.default_rng(1).integers(0, 3, 48), ("indoor", "night"))
