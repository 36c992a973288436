"""Latency at 224 pixels, batch 1: INT8 ÷ float in one runtime, and five INT8 members ÷ one float model.

    python benchmarks/latency.py [--backbones NAME …] [--members 5] [--threads 2] [--rounds 9] [--work FOLDER]
                                 [--json FILE]

Networks have random weights, with batch-norm statistics of their own: latency does not depend on the weights. Exports
are calibrated on noise. The ONNX files run in onnxruntime and in OpenVINO; all of one backbone in turns, each in a
process of its own (`qtdog bench` does the same with any files). FOLDER keeps the files, and what is there already is
not made again. The cascade is not in these numbers: every member runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qtdog.conversion.attach import attach
from qtdog.conversion.bake import bake
from qtdog.export.bench import Bench, Measured, Plan, bench
from qtdog.export.bench_stats import spread
from qtdog.export.export import export
from qtdog.export.formats import FORMATS
from qtdog.export.images import LabelledImages
from qtdog.export.subject import read_subject
from qtdog.models.backbones import create_network, preprocessing
from qtdog.models.network import Network
from qtdog.packing.ensemble_file import save_ensemble
from qtdog.packing.packed_file import PackedModel, save_packed

CLASSES = [f"class {index}" for index in range(7)]
EXPORTS = [("one", "onnx"), ("one", "onnx-int8"), ("all", "onnx-int8")]
RUNTIMES = ("onnxruntime", "openvino")
N_IMAGES, N_CALIBRATION = 16, 8


def network(backbone: str, size: int, seed: int) -> Network:
    """Return a network with random weights through which signals neither die nor explode."""
    made = create_network(
        backbone, n_classes=len(CLASSES), channels=3, image_size=size, weights="none", freeze_bn=True, seed=seed
    )
    norms = [layer for layer in made.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum, norm.training = 1.0, True
    with torch.no_grad():
        made(torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(seed)))
        made.classifier.bias[0] += 100  # noise leaves a random network in doubt, and an export must answer alike
    return made.eval()


def packed(backbone: str, size: int, seed: int, *, bits: int | None = 7) -> PackedModel:
    """Return what a run would ship: codes of `bits` bits, or floats."""
    made = network(backbone, size, seed)
    if bits is not None:
        attach(made, bits=bits, exclude=("classifier",)).enable()
    mean, std = preprocessing(backbone)
    how = {"image_size": size, "channels": 3, "mean": mean, "std": std}
    metadata: dict[str, Any] = {"backbone": backbone, "classes": CLASSES, "preprocessing": how, "pretraining": "none"}
    metadata |= {"source_domains": ["noise"], "target_domain": None, "accuracy": {}, "bits": bits, "step": 0}
    baked = bake(made)
    return PackedModel(baked.quantized, baked.rest, metadata | {"config_hash": f"{seed}"})


def make_files(backbone: str, options: argparse.Namespace, folder: Path) -> list[Path]:
    """Return one float model and the exports, made where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.safetensors" for name in ("float", "one", "all")}
    if not files["all"].is_file():
        plain = packed(backbone, options.size, 0, bits=None)
        save_packed(files["float"], plain.quantized, plain.rest, plain.metadata)
        members = [packed(backbone, options.size, seed) for seed in range(options.members)]
        save_packed(files["one"], members[0].quantized, members[0].rest, members[0].metadata)
        about = {"kind": "eoq", "accuracy": {}, "training_steps": 0, "training_runs": 0.0}
        save_ensemble(files["all"], members, about)
    pixels = np.random.default_rng(0).integers(0, 256, (N_IMAGES, options.size, options.size, 3), dtype=np.uint8)
    images = LabelledImages(pixels, np.zeros(N_IMAGES, dtype=np.int64), ("noise",))
    made = [files["float"]]
    for which, name in EXPORTS:
        out = folder / f"{which}-{name}{FORMATS[name].suffix}"
        if not out.is_file():
            print(f"making {out}", flush=True)
            export(read_subject(files[which]), out, name, images, n_calibration=N_CALIBRATION)
        made.append(out)
    return made


def ratio(of: Measured, to: Measured, *, processor: bool) -> str:
    """Return a ratio with its quartiles as text."""
    ours, theirs = (row.timing.round_cpu_s if processor else row.timing.round_s for row in (of, to))
    found = spread([a / b for a, b in zip(ours, theirs, strict=True)])
    return f"{found.median:.2f} ({found.low:.2f} – {found.high:.2f})"


def show(backbone: str, found: Bench, members: int) -> None:
    """Print the ratios that matter, of wall time and of processor time."""
    eager, *others = found.rows
    lines = []
    for index, runtime in enumerate(RUNTIMES):
        plain, integer, all_integer = others[index :: len(RUNTIMES)]
        lines += [
            (f"INT8 ÷ float, {runtime}", integer, plain),
            (f"{members} members INT8 in {runtime} ÷ float in eager PyTorch", all_integer, eager),
            (f"{members} members INT8 ÷ float, {runtime}", all_integer, plain),
        ]
    for text, of, to in lines:
        print(
            f"| {backbone} | {text} | {ratio(of, to, processor=False)} | {ratio(of, to, processor=True)} |", flush=True
        )


def main() -> None:
    """Measure each backbone and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["tf_efficientnet_lite0", "resnet50"])
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        print("| backbone | what | wall time | processor time |\n| --- | --- | --- | --- |", flush=True)
        for backbone in options.backbones:
            files = make_files(backbone, options, work / backbone)
            found = bench(files, Plan(threads=options.threads, n_rounds=options.rounds, runtimes=RUNTIMES))
            show(backbone, found, options.members)
            results[backbone] = found.to_json()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
