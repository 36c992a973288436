"""INT8 of qtdog beside NNCF's in OpenVINO and onnxruntime's own: latency, size, and what is left of the answers.

    pip install nncf
    python benchmarks/peers_int8.py [--run RUN --data DATA] [--backbones NAME …] [--sizes 96 224]
                                    [--rounds 9] [--calls 3] [--num-calibration 128] [--json FILE]

All three begin with the same network in the same float ONNX file and see the same calibration images. Ours is `qtdog
export --format onnx-int8`, run in both runtimes. NNCF is `nncf.quantize` (mixed preset, 8 bits; for transformers with
their model type), run in OpenVINO. onnxruntime is `quant_pre_process` and `quantize_static` (QDQ, MinMax, per channel,
uint8 activations, int8 weights). Each number is a ratio to the float file in the same runtime.

With --run the network is a trained one at its own image size, calibrated on training images of its sources, and its
accuracy is measured on all images of its unseen domain. The networks of --backbones have random weights of 7 bits, with
batch-norm statistics of their own: for these the error of the logits says how well the numbers are kept, not how well
images are told apart. It is the root mean square of the difference to the float file, as a share of that of the float
logits, both after the mean over the images is taken away.

One thread, rounds in turns, processor time and wall time, median and quartiles of the paired ratios.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import onnxruntime
import openvino
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from qtdog.conversion.attach import attach
from qtdog.conversion.save import bake
from qtdog.core.errors import QtdogError
from qtdog.data.open import open_any
from qtdog.export.benchmark_measures import Spread, ratio_spread
from qtdog.export.export import export, make_graph
from qtdog.export.onnx_ensemble import join
from qtdog.export.onnx_graph import member_graphs, save_onnx
from qtdog.export.packed_source import PackedSource, read_packed_source
from qtdog.export.parity import Draw, LabelledImages, draw_export_images, draw_images
from qtdog.models.backbones import create_network, preprocessing
from qtdog.packing.packed_file import save_packed

CLASSES = [f"class {index}" for index in range(10)]
BACKBONES = ["tf_efficientnet_lite0", "mobilenetv3_large_100", "resnet50", "deit_small_patch16_224"]
N_TEST = 32
TRANSFORMERS = ("deit", "vit", "swin")
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Run = Callable[[Pixels], Floats]
"""Images (n, H, W, C) to logits (n, n_classes)."""


def random_source(backbone: str, size: int, path: Path) -> PackedSource:
    """Return a packed model with random weights of 7 bits, through which signals neither die nor explode."""
    made = create_network(
        backbone, n_classes=len(CLASSES), channels=3, image_size=size, weights="none", freeze_bn=True, seed=0
    )
    norms = [layer for layer in made.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum, norm.training = 1.0, True
    with torch.no_grad():
        made(torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)))
    attach(made.eval(), bits=7, exclude=("classifier",)).enable()
    mean, std = preprocessing(backbone)
    how = {"image_size": size, "channels": 3, "mean": mean, "std": std}
    metadata: dict[str, Any] = {"backbone": backbone, "classes": CLASSES, "preprocessing": how, "pretraining": "none"}
    metadata |= {"source_domains": ["noise"], "target_domain": None, "accuracy": {}, "bits": 7, "step": 0}
    baked = bake(made)
    save_packed(path, baked.quantized, baked.rest, metadata | {"config_hash": "0"})
    return read_packed_source(path)


def smooth_noise(size: int, n: int) -> Pixels:
    """Return n images of smooth noise: neighboring pixels are alike, as in photographs."""
    coarse = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, 8, 8))).float()
    fine = nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 255)
    return fine.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def save_float(source: PackedSource, path: Path) -> None:
    """Write the packed model as an ONNX file with plain float weights, as other tools expect it."""
    module = source.module()
    onnx.save(onnx_ir.to_proto(join(source, module, list(member_graphs(source, module)))), path)


def quantize_by_qtdog(source: PackedSource, out: Path, images: LabelledImages, *, trained: bool) -> None:
    """Write what `qtdog export` makes of a packed model; random weights have no answers that it could compare."""
    if trained:
        export(source, out, "onnx-int8", images, calibration=images)
    else:
        graph, info = make_graph(source, source.info("onnx-int8"), images)
        save_onnx(source, graph, out, info)


class Reader(CalibrationDataReader):
    """Gives onnxruntime's quantizer one image after another."""

    def __init__(self, name: str, pixels: Pixels) -> None:
        self.images = iter([{name: pixels[index : index + 1]} for index in range(len(pixels))])

    def get_next(self) -> dict[str, Pixels] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the next image, or None."""
        return next(self.images, None)


def quantize_by_onnxruntime(plain: Path, out: Path, pixels: Pixels) -> None:
    """Write what `onnxruntime.quantization` makes of a float file."""
    ready = out.with_name("ready.onnx")
    quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
    name = onnx.load(plain).graph.input[0].name
    quantize_static(
        str(ready),
        str(out),
        Reader(name, pixels),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def quantize_by_nncf(plain: Path, out: Path, pixels: Pixels, *, transformer: bool) -> None:
    """Write what NNCF makes of a float file, as OpenVINO IR."""
    import nncf  # pyright: ignore[reportMissingImports]  # not among the libraries that qtdog installs

    data = nncf.Dataset([pixels[index : index + 1] for index in range(len(pixels))])
    made = nncf.quantize(
        openvino.Core().read_model(plain),
        data,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(pixels),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )
    openvino.save_model(made, out, compress_to_fp16=False)


def open_in_onnxruntime(path: Path) -> Run:
    """Return a function that runs a file with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: np.asarray(session.run(["logits"], {name: images})[0])


def open_in_openvino(path: Path) -> Run:
    """Return a function that runs a file with one thread, what is not in integers in float32."""
    hints = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    hints |= {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
    compiled = openvino.Core().compile_model(path, "CPU", hints)
    output = compiled.output("logits")
    return lambda images: np.array(compiled([images])[output])


@dataclass(frozen=True)
class Row:
    """One file in one runtime, beside the float file in that runtime.

    Attributes:
        network, size: as asked for.
        name: of the tool, and of the runtime.
        n_bytes: on disk.
        cpu, wall: ratios to float.
        logit_error: see the first lines of this script.
        same_frac: images with the same first choice as float.
        accuracy: on the images of the unseen domain; None without a trained model.
    """

    network: str
    size: int
    name: str
    n_bytes: int
    cpu: Spread
    wall: Spread
    logit_error: float
    same_frac: float
    accuracy: float | None

    def text(self) -> str:
        """Return it as a row of a table."""
        accuracy = "" if self.accuracy is None else f"{100 * self.accuracy:.2f}"
        ratios = " | ".join(f"{one.median:.2f} ({one.low:.2f} – {one.high:.2f})" for one in (self.cpu, self.wall))
        about = f"| {self.network}, {self.size} px | {self.name} | {self.n_bytes / 1e6:.2f} | {ratios}"
        return f"{about} | {self.logit_error:.3f} | {100 * self.same_frac:.1f} | {accuracy} |"


def n_bytes(path: Path) -> int:
    """Return the bytes of a model file, with the weights beside it."""
    beside = path.with_suffix(".bin")
    return path.stat().st_size + (beside.stat().st_size if path.suffix == ".xml" else 0)


def compare(
    source: PackedSource,
    calibration: Pixels,
    test: LabelledImages,
    folder: Path,
    options: argparse.Namespace,
    *,
    trained: bool,
) -> list[Row]:
    """Return the rows of one network; a tool that refuses it is said and left out."""
    backbone, size = source.infos[0].backbone, source.infos[0].preprocessing.image_size
    plain = folder / "float.onnx"
    save_float(source, plain)
    answers = open_in_onnxruntime(plain)
    whole = LabelledImages(calibration, answers(calibration).argmax(1), ("calibration",))
    makers: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "qtdog": (
            folder / "qtdog.onnx",
            lambda out: quantize_by_qtdog(source, out, whole, trained=trained),
        ),
        "onnxruntime": (
            folder / "onnxruntime.onnx",
            lambda out: quantize_by_onnxruntime(plain, out, calibration),
        ),
        "nncf": (
            folder / "nncf.xml",
            lambda out: quantize_by_nncf(plain, out, calibration, transformer=backbone.startswith(TRANSFORMERS)),
        ),
    }
    files = {}
    for name, (out, make) in makers.items():
        if name in options.tools:
            try:
                make(out)
                files[name] = out
            except QtdogError as error:
                print(f"| {backbone}, {size} px | {name} | refused: {error} |", flush=True)
    opened: dict[str, tuple[Path, Run]] = {}
    for name, path in {"float": plain, **files}.items():
        if name != "nncf":
            opened[f"{name}, onnxruntime"] = path, open_in_onnxruntime(path)
        if name != "onnxruntime":
            opened[f"{name}, OpenVINO"] = path, open_in_openvino(path)
    logits = {name: _in_batches(run, test.pixels) for name, (_, run) in opened.items()}
    times = measure([run for _, run in opened.values()], test.pixels[:1], options.rounds, options.calls)
    rounds = dict(zip(opened, times, strict=True))
    rows = []
    for name, (path, _) in opened.items():
        base = f"float, {name.partition(', ')[2]}"
        cpu, wall = (
            ratio_spread([a / b for a, b in zip(rounds[name][k], rounds[base][k], strict=True)]) for k in (0, 1)
        )
        right = float((logits[name].argmax(1) == test.labels).mean()) if trained else None
        same = float((logits[name].argmax(1) == logits[base].argmax(1)).mean())
        rows.append(
            Row(backbone, size, name, n_bytes(path), cpu, wall, relative_error(logits[name], logits[base]), same, right)
        )
    return rows


def relative_error(found: Floats, expected: Floats) -> float:
    """Return the error of logits (n, n_classes) as a share of what varies from image to image.

    Example:
        >>> relative_error(np.array([[1.0], [3.0]]), np.array([[0.0], [2.0]]))
        0.0
    """
    found, expected = found - found.mean(0), expected - expected.mean(0)
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


def _in_batches(run: Run, pixels: Pixels) -> Floats:
    return np.concatenate([run(pixels[start : start + 32]) for start in range(0, len(pixels), 32)])


def measure(runs: Sequence[Run], image: Pixels, n_rounds: int, n_calls: int) -> list[tuple[list[float], list[float]]]:
    """Return processor and wall time of each run in each round; the order turns with the rounds."""
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in runs]
    for run in runs:
        run(image)
    for index in range(n_rounds):
        for place in range(len(runs)):
            place = (place + index) % len(runs)
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(n_calls):
                runs[place](image)
            found[place][0].append(time.process_time() - cpu)
            found[place][1].append(time.perf_counter() - wall)
    return found


def trained_images(source: PackedSource, data: str, n_calibration: int) -> tuple[LabelledImages, LabelledImages]:
    """Return training images of the sources to calibrate on, and all images of the unseen domain."""
    dataset, info = open_any(data), source.infos[0]
    calibration, _ = draw_export_images(dataset, source, Draw(2), n_calibration)
    target = Draw(len(dataset.class_index), domains=(str(info.target_domain),), force_target=True)
    return calibration, draw_images(dataset, info, target)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="folders of trained, quantized runs")
    parser.add_argument("--data", help="their data set")
    parser.add_argument("--backbones", nargs="*", default=BACKBONES, help="networks with random weights")
    parser.add_argument("--sizes", nargs="+", type=int, default=[96, 224])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=3, help="of each file in a round")
    parser.add_argument("--num-calibration", type=int, default=128)
    parser.add_argument("--tools", nargs="+", default=["qtdog", "onnxruntime", "nncf"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.run and not options.data:
        parser.error("--run needs --data")
    torch.set_num_threads(1)
    ratios = "processor time ÷ float | wall time ÷ float"
    print(f"| network | file | MB | {ratios} | error of logits | same class, % | accuracy, % |")
    print("| --- " * 8 + "|", flush=True)
    rows: list[Row] = []
    for run in options.run:
        source = read_packed_source(run / "model.safetensors")
        calibration, test = trained_images(source, options.data, options.num_calibration)
        rows += _shown(source, calibration.pixels, test, options, trained=True)
    for backbone in options.backbones:
        for size in options.sizes:
            pixels = smooth_noise(size, options.num_calibration + N_TEST)
            test = LabelledImages(pixels, np.zeros(len(pixels), dtype=np.int64), ("noise",))
            first, others = test.split(options.num_calibration)
            with tempfile.TemporaryDirectory() as folder:
                source = random_source(backbone, size, Path(folder) / "model.safetensors")
                rows += _shown(source, first.pixels, others, options, trained=False)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _shown(
    source: PackedSource, calibration: Pixels, test: LabelledImages, options: Any, *, trained: bool
) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(source, calibration, test, Path(folder), options, trained=trained)
    for row in rows:
        print(row.text(), flush=True)
    return rows


if __name__ == "__main__":
    main()
