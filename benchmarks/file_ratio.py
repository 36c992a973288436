"""Size of packed files against float32, from disk, for backbones with random weights.

    python benchmarks/file_ratio.py [--bits 7] [--json FILE]

Each model is attached, enabled, saved and measured: header, step sizes, batch norm, classifier and all. The classifier
stays in float, as in the paper. `text encoder` has DistilBERT's sizes (30,522 tokens, 6 layers of width 768).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from torch import nn

from qtdog.conversion.attach import attach
from qtdog.conversion.select import find_layers
from qtdog.conversion.ship import save
from qtdog.packing.sizes import file_sizes

N_CLASSES = 7
HEADS = ("fc", "head", "classifier")


def text_encoder() -> nn.Module:
    """Return embeddings, a transformer and a linear head of DistilBERT's sizes."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    parts = {
        "tokens": nn.Embedding(30522, 768),
        "positions": nn.Embedding(512, 768),
        "encoder": nn.TransformerEncoder(layer, 6, enable_nested_tensor=False),
        "classifier": nn.Linear(768, N_CLASSES),
    }
    return nn.ModuleDict(parts)


def backbone(name: str) -> Callable[[], nn.Module]:
    """Return a maker of a timm model."""
    return lambda: timm.create_model(name, num_classes=N_CLASSES)


MODELS: dict[str, Callable[[], nn.Module]] = {
    name: backbone(name) for name in ("tf_efficientnet_lite0", "resnet18", "resnet50", "deit_small_patch16_224")
}
MODELS["text encoder"] = text_encoder


def measure(make: Callable[[], nn.Module], bits: int) -> dict[str, float]:
    """Return parameters and sizes of one model."""
    torch.manual_seed(0)
    model = make()
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    heads = [layer.name for layer in find_layers(model) if layer.name in HEADS]
    attach(model, bits=bits, exclude=heads).enable()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        return {"n_parameters": n_parameters, **asdict(file_sizes(path))}


def main() -> None:
    """Measure every model and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args()
    results = {name: measure(make, options.bits) for name, make in MODELS.items()}
    print(
        f"{'model':24} {'parameters':>12} {'float32':>11} {f'{options.bits} bit':>11} {'ratio':>6} {'bits/weight':>12}"
    )
    for name, row in results.items():
        sizes = f"{row['float32_bytes'] / 1e6:>8.2f} MB {row['bytes'] / 1e6:>8.2f} MB"
        print(f"{name:24} {row['n_parameters']:>12,} {sizes} {row['ratio']:>6.2f} {row['bits_per_weight']:>12.2f}")
    text = json.dumps({"bits": options.bits, "results": results})
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
