"""Size of packed files against float32 and against the entropy of their codes, from disk, and the time to read them.

    python benchmarks/file_ratio.py [FILE …] [--models NAME …] [--bits 7] [--steps 3] [--json FILE]

Each model begins with random weights, trains a few steps with LSQ on noise (the text encoder none), is saved and
measured: header, step sizes, batch norm, classifier and all. The classifier stays in float, as in the paper. `text
encoder` has DistilBERT's sizes (30,522 tokens, 6 layers of width 768). Packed FILEs, such as that of a run, are written
again by this version and measured too. Times are of the processor, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import nn

from qtdog.conversion.attach import attach
from qtdog.conversion.layers import find_layers
from qtdog.conversion.save import save
from qtdog.packing.packed_file import load_packed, save_packed
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


def trained(make: Callable[[], nn.Module], bits: int, steps: int) -> nn.Module:
    """Return a model with LSQ attached, after a few steps towards smaller outputs for noise."""
    torch.manual_seed(0)
    model = make()
    heads = [layer.name for layer in find_layers(model) if layer.name in HEADS]
    attach(model, bits=bits, exclude=heads).enable()
    if isinstance(model, nn.ModuleDict):
        return model
    size = 224 if hasattr(model, "pos_embed") else 64
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, size, size)).square().mean().backward()
        optimizer.step()
    return model


def cpu_s(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the processor time of a call, the median of several."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return median(times)


def measured(path: Path, write_s: float) -> dict[str, Any]:
    """Return sizes of a file, and what reading it costs."""
    read_s = cpu_s(lambda: load_packed(path), repeats=5)
    sizes = file_sizes(path)
    per_mb = 1e3 * read_s / (sizes.bytes / 1e6)
    return asdict(sizes) | {"write_s": write_s, "read_s": read_s, "read_ms_per_mb": per_mb}


def of_model(make: Callable[[], nn.Module], bits: int, steps: int) -> dict[str, Any]:
    """Return parameters, sizes and times of one model."""
    model = trained(make, bits, steps)
    n_parameters = sum(parameter.numel() for name, parameter in model.named_parameters() if "log" not in name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        return {"n_parameters": n_parameters, **measured(path, cpu_s(lambda: save(model, path)))}


def of_file(file: Path) -> dict[str, Any]:
    """Return parameters, sizes and times of a packed file, written again."""
    old = load_packed(file)
    n_parameters = sum(value.codes.numel() for value in old.quantized.values())
    n_parameters += sum(value.numel() for name, value in old.rest.items() if name.endswith(("weight", "bias")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_s = cpu_s(lambda: save_packed(path, old.quantized, old.rest, old.metadata))
        return {"n_parameters": n_parameters, **measured(path, write_s)}


def main() -> None:
    """Measure every model and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--bits", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args()
    print(
        "| model | parameters | float32 | packed | ratio | bits per code | their entropy | ÷ bound | read, ms per MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    results = {}
    works = [(str(file), lambda file=file: of_file(file)) for file in options.files]
    works += [(name, lambda name=name: of_model(MODELS[name], options.bits, options.steps)) for name in options.models]
    for name, work in works:
        row = results[name] = work()
        sizes = f"{row['float32_bytes'] / 1e6:.2f} MB | {row['bytes'] / 1e6:.2f} MB | {row['ratio']:.2f}"
        codes = f"{row['bits_per_code']:.3f} | {row['entropy_bits_per_code']:.3f} | {row['over_entropy']:.3f}"
        print(f"| {name} | {row['n_parameters']:,} | {sizes} | {codes} | {row['read_ms_per_mb']:.1f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"bits": options.bits, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
