"""Step time of quantization-aware training as a multiple of float training.

    python benchmarks/step_time.py [--models NAME …] [--variants NAME …] [--repeats N] [--threads N]
                                   [--clock cpu] [--batch N] [--compile] [--profile] [--json]

Every variant of a model lives in one process; a round runs one optimizer step of each, in rotating order, and the ratio
to the float step of the same round is what counts. Reported: the median of these paired ratios, with its quartiles.

Variants: every quantizer that works during training, by its name, with its default options and what the training loop
does before each step and during the forward pass; `lsq-alone`, LSQ one layer at a time in place of groups;
`lsq-stochastic`, LSQ with stochastic rounding; and two other implementations of LSQ: `fused` is
torch's learnable fake-quantize kernel (whose gradients differ up to half a step outside the clip range), `textbook` is
LSQ's formula in elementwise operations with the detach trick. A variant of resnet50 takes about 0.4 GB.

With `--compile` float and every quantizer are measured a second time, as NAME+compile: the forward pass is one graph of
torch.compile with the quantizers inside, as with `train.compile=inductor`. The first two rounds compile for minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode

from qtdog.conversion.attach import attach, sites
from qtdog.conversion.layers import find_layers
from qtdog.core.quantized import QuantSpec, scale_shape
from qtdog.quantizers.registry import QUANTIZERS, works_after_training
from qtdog.quantizers.step_size_init import initial_scale

CASES = {"resnet50": (224, 8), "tf_efficientnet_lite0": (96, 48)}  # pixels and batch size
SPEC = QuantSpec(7)
CLASSIFIERS = {"fc", "classifier"}


class Textbook(nn.Module):
    """LSQ's formula as written, by plain autograd: divide, clamp, round, straight-through, multiply."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(initial_scale(weight, SPEC).reshape(scale_shape(weight.ndim, 0)))
        self.grad_scale = 1 / math.sqrt(weight[0].numel() * SPEC.qmax)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight."""
        scaled = self.scale * self.grad_scale
        scale = (self.scale - scaled).detach() + scaled
        ratio = torch.clamp(weight / scale, SPEC.qmin, SPEC.qmax)
        return ((ratio.round() - ratio).detach() + ratio) * scale


class Fused(nn.Module):
    """Torch's own kernel."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(initial_scale(weight, SPEC))
        self.zero = torch.zeros_like(self.scale.detach())
        self.grad_scale = 1 / math.sqrt(weight[0].numel() * SPEC.qmax)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight."""
        return torch.ops.aten._fake_quantize_learnable_per_channel_affine(
            weight, self.scale, self.zero, 0, SPEC.qmin, SPEC.qmax, self.grad_scale
        )


OTHERS: dict[str, Callable[[Tensor], nn.Module]] = {"fused": Fused, "textbook": Textbook}
ALONE = "lsq-alone"
OPTIONS: dict[str, dict[str, Any]] = {
    ALONE: {"quantizer": "lsq"},
    "lsq-stochastic": {"quantizer": "lsq", "rounding": "stochastic"},
}
OPTIONS |= {name: {"quantizer": name} for name in QUANTIZERS if not works_after_training(name)}
VARIANTS = (*OPTIONS, *OTHERS)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
HALFWAY = 0.5  # of the quantized steps


Context = contextlib.AbstractContextManager[Any]


def quantize(model: nn.Module, variant: str) -> tuple[Callable[[int], None], Context]:
    """Quantize all layers of `model` but the classifier, in place.

    Returns:
        What the training loop does before each step, and the context of its forward pass.
    """
    layers = find_layers(model)
    if variant in OPTIONS:
        left_out = [layer.name for layer in layers if layer.name in CLASSIFIERS]
        quantizers = attach(model, bits=SPEC.bits, exclude=left_out, **OPTIONS[variant])
        quantizers.enable()
        passing = contextlib.nullcontext() if variant == ALONE else quantizers.groups()
        return (lambda step: quantizers.begin_step(step, HALFWAY)), passing
    for layer in layers:
        if variant in OTHERS and layer.name not in CLASSIFIERS:
            register_parametrization(layer.module, layer.tensor_name, OTHERS[variant](layer.weight))
    return (lambda step: None), contextlib.nullcontext()


COMPILED = "+compile"


def one_graph(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a model, its quantizers enabled, as one graph."""
    for site in sites(model):
        site.quantizer.read_()
    return torch.compile(model, fullgraph=True, dynamic=False)


def step_of(model: nn.Module, variant: str, images: Tensor, labels: Tensor) -> Callable[[int], None]:
    """Return a function that runs one training step of plain Adam."""
    prepare, passing = quantize(model, variant.removesuffix(COMPILED))
    forward = one_graph(model) if variant.endswith(COMPILED) else model
    passing = contextlib.nullcontext() if variant.endswith(COMPILED) else passing
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)

    def step(index: int) -> None:
        prepare(index)
        optimizer.zero_grad()
        with passing:
            logits = forward(images)
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    return step


def steps_of(backbone: str, variants: Sequence[str], batch: int) -> dict[str, Callable[[int], None]]:
    """Return a function for float and each variant that runs one training step, all from one start on one batch."""
    size = CASES[backbone][0]
    torch.manual_seed(0)
    base = timm.create_model(backbone, num_classes=7).train().to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(7, (batch,))
    return {name: step_of(copy.deepcopy(base), name, images, labels) for name in ("float", *variants)}


def measure(
    backbone: str, variants: Sequence[str], repeats: int, clock: Callable[[], float], batch: int
) -> dict[str, list[float]]:
    """Return the seconds of every step of float and of the variants, round by round, less the first two rounds."""
    steps = steps_of(backbone, variants, batch)
    names = tuple(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(repeats + 2):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            steps[name](index)
            times[name].append(clock() - start)
    return {name: values[2:] for name, values in times.items()}


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return, per variant, the median step time in seconds and the quartiles of its paired ratio to float."""
    result = {}
    for name, values in times.items():
        ratios = [value / reference for value, reference in zip(values, times["float"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = {"step_s": statistics.median(values), "ratio": middle, "ratio_q1": low, "ratio_q3": high}
        result[name] = {key: round(value, 4) for key, value in row.items()}
    return result


class OperationTimes(TorchDispatchMode):
    """Adds up the processor time of each of torch's operations in this thread, seconds by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and time one operation."""
        start = time.thread_time()
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - start
        return result


def show_profile(backbone: str, variants: Sequence[str], batch: int, n_rounds: int) -> None:
    """Print the median processor time of each operation in a step, for float and the variants in turns."""
    steps = steps_of(backbone, variants, batch)
    names = tuple(steps)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for index in range(n_rounds + 1):
        for name in names:
            start = time.thread_time()
            with OperationTimes() as times:
                steps[name](index)
            whole = time.thread_time() - start
            rest = {"between operations": whole - sum(times.seconds.values())}
            rounds[name].append(times.seconds | rest)
    keys = {key for found in rounds.values() for one in found for key in one}
    medians = {
        key: {name: 1e3 * statistics.median(one.get(key, 0.0) for one in rounds[name][1:]) for name in names}
        for key in keys
    }
    total = sum(row["float"] for row in medians.values())
    print(f"{backbone} at {CASES[backbone][0]}, batch {batch}: ms of processor time in a step, medians of {n_rounds}")
    for key, row in sorted(medians.items(), key=lambda item: -max(item[1].values())):
        if max(row.values()) > 0.002 * total:
            print(f"{key:40}" + "".join(f"{row[name]:>12.1f}" for name in names))
    print(f"{'all':40}" + "".join(f"{sum(row[name] for row in medians.values()):>12.1f}" for name in names))


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="which models; default all")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="which variants; default all",
    )
    parser.add_argument("--repeats", type=int, default=21, help="measured rounds per model (at least 2)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall time, or processor time of all threads, which other work on the machine moves less; default wall",
    )
    parser.add_argument("--batch", type=int, help="images per step; default that of the model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--compile", action="store_true", help="measure float and each quantizer compiled, too")
    parser.add_argument("--profile", action="store_true", help="print the time of each operation instead (one thread)")
    arguments = parser.parse_args()
    variants = list(arguments.variants)
    if arguments.compile:
        variants += [f"{name}{COMPILED}" for name in ("float", *variants) if name in OPTIONS or name == "float"]
    torch.set_num_threads(1 if arguments.profile else arguments.threads)
    if arguments.profile:
        for backbone in arguments.models:
            show_profile(backbone, variants, arguments.batch or CASES[backbone][1], arguments.repeats)
        return
    results = {}
    for backbone in arguments.models:
        size, batch = CASES[backbone]
        batch = arguments.batch or batch
        title = f"{backbone} at {size}, batch {batch}, {arguments.clock} time"
        results[title] = summary(measure(backbone, variants, arguments.repeats, CLOCKS[arguments.clock], batch))
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "repeats": arguments.repeats, "results": results}, indent=1))
        return
    for title, rows in results.items():
        print(f"{title}, {arguments.threads} threads, {arguments.repeats} rounds")
        for name, row in rows.items():
            spread = f"{row['ratio_q1']:.3f} … {row['ratio_q3']:.3f}"
            print(f"  {name:25s} {row['step_s'] * 1e3:8.1f} ms   {row['ratio']:.3f} × float   (quartiles {spread})")


if __name__ == "__main__":
    main()
