"""How large an ensemble file is beside one float32 model, from disk, and how large its networks are in memory.

    python benchmarks/ensemble_size.py [--backbones NAME …] [--members N] [--bits B] [--json FILE]

Members differ in every weight that trains, the floats of batch norm and classifier included; the frozen statistics of
batch norm are alike, as they are for members with the same pretraining. Weights are random: at 7 bits their codes have
an entropy of 4.36 bits, those of trained ones 4.37.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qtdog.conversion.attach import attach
from qtdog.conversion.save import bake
from qtdog.ensemble.model import load_ensemble_model
from qtdog.models.backbones import create_network, preprocessing
from qtdog.packing.ensemble_file import save_ensemble
from qtdog.packing.packed_file import PackedModel
from qtdog.packing.sizes import ensemble_sizes

ABOUT = {"kind": "eoq", "accuracy": {"source": None, "test": None}, "training_steps": 25_000, "training_runs": 5.0}
CLASSES = [f"class {index}" for index in range(7)]


def member(backbone: str, bits: int, seed: int) -> PackedModel:
    """Return a member with weights of its own, as a run would ship it."""
    network = create_network(
        backbone, n_classes=len(CLASSES), channels=3, image_size=224, weights="none", freeze_bn=True, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.01 * torch.rand(parameter.shape, generator=generator)
    attach(network, bits=bits, exclude=("classifier",)).enable()
    baked = bake(network)
    mean, std = preprocessing(backbone)
    how = {"image_size": 224, "channels": 3, "mean": mean, "std": std, "resize": "bilinear, antialiased, no crop"}
    metadata = {"backbone": backbone, "classes": CLASSES, "preprocessing": how, "pretraining": "none", "bits": bits}
    metadata |= {"source_domains": ["a", "b", "c"], "target_domain": "d", "dataset": "none", "selection": "source"}
    own = {"accuracy": {"source": 0.9, "test": 0.8 + seed / 100}, "step": 5000, "config_hash": f"{seed:012x}"}
    return PackedModel(baked.quantized, baked.rest, metadata | own)


def measure(backbone: str, n_members: int, bits: int, folder: Path) -> dict[str, Any]:
    """Return sizes of one ensemble file, and what it takes to load it."""
    file = folder / f"{backbone}.safetensors"
    save_ensemble(file, [member(backbone, bits, seed) for seed in range(n_members)], ABOUT)
    started = time.perf_counter()
    model = load_ensemble_model(file)
    seconds = time.perf_counter() - started
    weights = sum(parameter.nbytes for parameter in model.parameters())
    sizes = asdict(ensemble_sizes(file))
    return {"backbone": backbone, "bits": bits} | sizes | {"load_s": seconds, "float_bytes": weights}


def main() -> None:
    """Measure each backbone and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["tf_efficientnet_lite0", "resnet50"])
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--bits", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, options.members, options.bits, Path(folder)) for name in options.backbones]
    print(f"{options.members} members of {options.bits} bits")
    columns = f"{'file':>9} {'one float32':>12} {'times':>6} {'÷ bound':>8} {'shared':>8} {'in memory':>10} {'load':>6}"
    print(f"{'backbone':24} {columns}")
    for row in rows:
        file, one, shared, memory = (
            f"{row[key] / 1e6:.2f} MB" for key in ("bytes", "float32_bytes", "shared_bytes", "float_bytes")
        )
        times, bound, load = f"{row['float32_models']:.3f}", f"{row['over_entropy']:.3f}", f"{row['load_s']:.2f} s"
        print(f"{row['backbone']:24} {file:>9} {one:>12} {times:>6} {bound:>8} {shared:>8} {memory:>10} {load:>6}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
