"""Latency at batch 1: INT8 ÷ float in one runtime, and five INT8 members ÷ one float model.

    python benchmarks/latency.py [--backbones NAME …] [--members 5] [--size 224] [--threads 2] [--rounds 9]
                                 [--work FOLDER] [--json FILE]
    python benchmarks/latency.py --ensemble FOLDER --data DATA [--threads 2] [--rounds 25] …

Without --ensemble networks have random weights, with batch-norm statistics of their own: latency does not depend on the
weights. Exports are calibrated on noise.

With --ensemble the members and images are real: a folder that `qtdog ensemble` made of runs that are still there, and
their data. Timed are the images of the unseen domain, and the held-out images of the sources.

The ONNX files run in onnxruntime and in OpenVINO, all of one backbone in turns, each in a process of its own (`qtdog
bench` does the same with any files). --work keeps the files, and what is there already is not made again.
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
from qtdog.conversion.save import bake
from qtdog.data.open import open_any
from qtdog.ensemble.model import read_member
from qtdog.ensemble.scoring import EvaluationSet, open_evaluation_set
from qtdog.export.benchmark import Bench, BenchmarkPlan, Measured, bench
from qtdog.export.benchmark_measures import ratio_spread
from qtdog.export.export import export
from qtdog.export.formats import FORMATS
from qtdog.export.packed_source import PackedSource, read_packed_source
from qtdog.export.parity import LabelledImages
from qtdog.models.backbones import create_network, preprocessing
from qtdog.models.network import Network
from qtdog.packing.ensemble_file import load_ensemble, save_ensemble
from qtdog.packing.packed_file import PackedModel, save_packed

CLASSES = [f"class {index}" for index in range(7)]
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
    whole, one = read_packed_source(files["all"]), read_packed_source(files["one"])
    subjects = [
        (one, "one-float", "onnx"),
        (one, "one-int8", "onnx-int8"),
        (whole, "all-int8", "onnx-int8"),
    ]
    return [files["float"], *exported(subjects, folder, images, N_CALIBRATION)]


def exported(
    subjects: list[tuple[PackedSource, str, str]], folder: Path, images: LabelledImages, n_calibration: int
) -> list[Path]:
    """Return the exports of subjects, each with the name of its file and its format, made where they are not there."""
    made = []
    for source, name, kind in subjects:
        out = folder / f"{name}{FORMATS[kind].suffix}"
        if not out.is_file():
            print(f"making {out}", flush=True)
            export(source, out, kind, images, n_calibration=n_calibration)
        made.append(out)
    return made


def open_ensemble(folder: Path, data: str) -> tuple[Path, EvaluationSet]:
    """Return the file of an ensemble, and the images of its members' problem."""
    told = json.loads((folder / "result.json").read_text())["members"][0]["folder"]
    config = read_member(folder / told).config
    return folder / "model.safetensors", open_evaluation_set(config, open_any(data, min_domains=1), same_splits=True)


def pictures(evaluation_set: EvaluationSet, indices: np.ndarray, domains: tuple[str, ...]) -> LabelledImages:
    """Return images as a runtime takes them, in random order."""
    order = np.random.default_rng(0).permutation(indices)
    return LabelledImages(
        evaluation_set.cache.gather(order).numpy(), evaluation_set.dataset.class_index[order].astype(np.int64), domains
    )


def real_files(file: Path, images: LabelledImages, folder: Path) -> list[Path]:
    """Return the first member alone, packed and exported, and the exports of the ensemble."""
    folder.mkdir(parents=True, exist_ok=True)
    first = load_ensemble(file).members[0]
    alone = folder / "one.safetensors"
    save_packed(alone, first.quantized, first.rest, first.metadata)
    subjects = [
        (read_packed_source(alone), "one-float", "onnx"),
        (read_packed_source(alone), "one-int8", "onnx-int8"),
        (read_packed_source(file), "all-int8", "onnx-int8"),
    ]
    return [alone, *exported(subjects, folder, images, 256)]


def measure_real(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure real members on real images of the sources and of the unseen domain, and print a table for each."""
    file, evaluation_set = open_ensemble(options.ensemble, options.data)
    splits, sources = evaluation_set.protocol.splits, evaluation_set.protocol.sources
    training = np.concatenate([splits[domain].train for domain in sources])
    files = real_files(
        file, pictures(evaluation_set, np.random.default_rng(0).permutation(training)[:1280], sources), work
    )
    target = evaluation_set.config.data.target
    timed = {"held-out images of the sources": np.concatenate([splits[domain].heldout for domain in sources])}
    timed[f"{target}, unseen"] = evaluation_set.dataset.indices(target)
    results = {}
    for name, indices in timed.items():
        images = pictures(evaluation_set, indices, sources)
        plan = BenchmarkPlan(threads=options.threads, n_rounds=options.rounds, runtimes=RUNTIMES)
        found = bench(files, plan, images=lambda _, images=images: images)
        show_real(name, found)
        results[name] = found.to_json()
    return results


def show_real(name: str, found: Bench) -> None:
    """Print what an ensemble costs and reaches on some images."""
    for index, runtime in enumerate(RUNTIMES):
        plain, integer, whole = found.rows[1 + index :: len(RUNTIMES)]
        for text, of in (("one INT8", integer), ("all members INT8", whole)):
            score = f"{100 * (of.accuracy or 0):.2f} %"
            ratios = f"{ratio(of, plain, processor=False)} | {ratio(of, plain, processor=True)}"
            print(f"| {name} | {text} ÷ one float, {runtime}: {score} | {ratios} |", flush=True)


def ratio(of: Measured, to: Measured, *, processor: bool) -> str:
    """Return a ratio with its quartiles as text."""
    ours, theirs = (row.timing.round_cpu_s if processor else row.timing.round_s for row in (of, to))
    found = ratio_spread([a / b for a, b in zip(ours, theirs, strict=True)])
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
    parser.add_argument("--ensemble", type=Path, help="folder that 'qtdog ensemble' made, for real members and images")
    parser.add_argument("--data", help="their data set")
    options = parser.parse_args()
    if options.ensemble and not options.data:
        parser.error("--ensemble needs --data")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        print("| backbone | what | wall time | processor time |\n| --- | --- | --- | --- |", flush=True)
        if options.ensemble:
            results = measure_real(options, work)
        for backbone in () if options.ensemble else options.backbones:
            files = make_files(backbone, options, work / backbone)
            found = bench(files, BenchmarkPlan(threads=options.threads, n_rounds=options.rounds, runtimes=RUNTIMES))
            show(backbone, found, options.members)
            results[backbone] = found.to_json()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
