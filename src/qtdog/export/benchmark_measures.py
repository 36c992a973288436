"""What a benchmark measures of a model: times and their ratios, memory, operators, features of the processor."""

from __future__ import annotations

import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qtdog.export.packed_source import library
from qtdog.export.runtimes import OpenModel


@dataclass(frozen=True)
class Turn:
    """Calls of one model, one after another.

    Attributes:
        seconds: wall time of each call.
        cpu_s: processor time of all of them together, all threads of the model's process.
    """

    seconds: tuple[float, ...]
    cpu_s: float

    @property
    def mean_s(self) -> float:
        """Wall time of a call.

        The mean, not the median: on a busy machine a short call may run between two interruptions and a long one
        cannot, so that medians would favor the short one.
        """
        return sum(self.seconds) / len(self.seconds)

    @property
    def mean_cpu_s(self) -> float:
        """Processor time of a call."""
        return self.cpu_s / len(self.seconds)


@dataclass(frozen=True)
class Spread:
    """Ratios of one model to another, one of each round.

    Attributes:
        median: of them.
        low: first quartile.
        high: third quartile.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Latencies of one model, over all rounds.

    Attributes:
        p50_s: median of a call.
        p95_s: 95 of 100 calls took at most that.
        images_per_s: images of all calls over their time.
        cpu_s: processor time of a call, median over rounds.
        ratio: wall time of a call ÷ that of the first model in the same round.
        cpu_ratio: the same of processor time; with one thread hardly touched by what else the machine does.
        n_calls: how many were timed.
        n_rounds: in how many rounds.
        round_s: mean wall time of a call, of each round: from these any other ratio can be made.
        round_cpu_s: the same of processor time.
    """

    p50_s: float
    p95_s: float
    images_per_s: float
    cpu_s: float
    ratio: Spread
    cpu_ratio: Spread
    n_calls: int
    n_rounds: int
    round_s: tuple[float, ...]
    round_cpu_s: tuple[float, ...]


def timing_of(turns: Sequence[Turn], first: Sequence[Turn], batch: int) -> Timing:
    """Return what the calls of one model say.

    Ratios are made within a round, whose turns follow one another: what slows the whole machine cancels.

    Args:
        turns: of the model, one of each round.
        first: of the model that others are compared with.
        batch: images per call.

    Example:
        >>> ours, base = [Turn((0.2, 0.2), 0.4), Turn((0.4,), 0.4)], [Turn((0.1,), 0.1), Turn((0.2,), 0.1)]
        >>> timing = timing_of(ours, base, 1)
        >>> timing.ratio, timing.cpu_ratio.median, timing.n_calls
        (Spread(median=2.0, low=2.0, high=2.0), 3.0, 3)
    """
    calls = np.concatenate([turn.seconds for turn in turns])
    pairs = list(zip(turns, first, strict=True))
    return Timing(
        p50_s=float(np.median(calls)),
        p95_s=float(np.quantile(calls, 0.95)),
        images_per_s=float(batch * calls.size / calls.sum()),
        cpu_s=float(np.median([turn.mean_cpu_s for turn in turns])),
        ratio=ratio_spread([ours.mean_s / base.mean_s for ours, base in pairs]),
        cpu_ratio=ratio_spread([ours.mean_cpu_s / base.mean_cpu_s for ours, base in pairs]),
        n_calls=int(calls.size),
        n_rounds=len(turns),
        round_s=tuple(turn.mean_s for turn in turns),
        round_cpu_s=tuple(turn.mean_cpu_s for turn in turns),
    )


def ratio_spread(ratios: Sequence[float]) -> Spread:
    """Return median and quartiles.

    Example:
        >>> ratio_spread([1.0, 2.0, 3.0, 4.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0)
    """
    low, median, high = (float(value) for value in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return Spread(median, low, high)


def pareto(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Return the positions that nothing else beats in one of two numbers without losing in the other, by cost.

    Both are better when smaller.

    Example:
        >>> pareto([1.0, 2.0, 3.0, 2.5], [0.5, 0.3, 0.4, 0.3])
        [0, 1]
    """
    best: list[int] = []
    for place in sorted(range(len(costs)), key=lambda index: (costs[index], losses[index])):
        if not best or losses[place] < losses[best[-1]]:
            best.append(place)
    return best


FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
FEATURES += ("asimddp", "i8mm", "bf16", "sve")  # of ARM
CPUINFO = Path("/proc/cpuinfo")


def cpu_features(cpuinfo: str | None = None) -> tuple[str, ...]:
    """Return what the processor has of the instructions that inference profits from; () where Linux does not tell.

    Without `avx512_vnni`, `avx_vnni` or `asimddp`, products of eight-bit integers are added up in 16 bits, which can
    saturate.

    Args:
        cpuinfo: the text of /proc/cpuinfo; None to read it.

    Example:
        >>> cpu_features("flags : fpu sse avx2 fma avx512_vnni")
        ('avx2', 'fma', 'avx512_vnni')
    """
    if cpuinfo is None:
        cpuinfo = CPUINFO.read_text() if CPUINFO.is_file() else ""
    lines = (line.split(":", 1)[1] for line in cpuinfo.splitlines() if line.startswith(("flags", "Features")))
    known = set(next(lines, "").split())
    return tuple(feature for feature in FEATURES if feature in known)


def reset_peak_memory() -> int:
    """Begin to measure the peak of this process's resident memory anew, where Linux can, and return what it holds now.

    Returns:
        Resident bytes now, or the peak so far on other systems.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, ValueError):
        return peak_memory()


def peak_memory() -> int:
    """Return the largest resident memory of this process in bytes, since it was last reset.

    Example:
        >>> peak_memory() > 10_000_000
        True
    """
    try:
        return _status("VmHWM")
    except (OSError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field}")


NO_WORK = {"Constant", "Parameter", "Result", "Input", "Output", "Const"}


@dataclass(frozen=True)
class Operators:
    """Operators of a model, counted by type.

    Attributes:
        in_file: as they stand in the file.
        in_runtime: as the runtime executes them, fused; None where it does not tell.
    """

    in_file: dict[str, int]
    in_runtime: dict[str, int] | None

    @property
    def n_in_file(self) -> int:
        """Operators of the file."""
        return sum(self.in_file.values())

    @property
    def n_in_runtime(self) -> int | None:
        """Operators that are executed, or None."""
        return None if self.in_runtime is None else sum(self.in_runtime.values())


def count_operators(model: OpenModel) -> Operators:
    """Return the operators of an opened model.

    For a packed file in eager PyTorch these are its layers, for a `torch.export` program the calls of its graph;
    nothing is fused in either.

    Raises:
        ModelError: a library that the runtime needs for this is not installed.
    """
    return COUNTERS[model.runtime](model)


def _onnxruntime(model: OpenModel) -> Operators:
    onnx, ort = library("onnx"), library("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3  # it warns that such a file belongs to this machine, and so it does
        ort.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])
        fused = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return Operators(_onnx_types(onnx, model.path), _counted(node.op_type for node in fused.graph.node))


def _openvino(model: OpenModel) -> Operators:
    openvino = library("openvino")
    if model.path.suffix == ".onnx":
        in_file = _onnx_types(library("onnx"), model.path)
    else:
        in_file = _counted(op.get_type_name() for op in openvino.Core().read_model(model.path).get_ops())
    layers = model.native.get_runtime_model().get_ops()
    return Operators(in_file, _counted(_openvino_type(layer) for layer in layers))


def _openvino_type(layer: Any) -> str:
    """Return the type of an executed layer, with its precision where it is integer."""
    details = layer.get_rt_info()
    name = details["layerType"].astype(str) if "layerType" in details else layer.get_type_name()
    precision = details["runtimePrecision"].astype(str) if "runtimePrecision" in details else ""
    return f"{name} {precision}" if precision in ("i8", "u8") and name not in NO_WORK else name


def _torch(model: OpenModel) -> Operators:
    graph = getattr(model.native, "graph", None)
    if graph is not None:
        return Operators(_counted(_call_name(node) for node in graph.nodes if node.op == "call_function"), None)
    leaves = (layer for layer in model.native.modules() if not any(True for _ in layer.children()))
    return Operators(_counted(type(layer).__name__ for layer in leaves if not isinstance(layer, nn.Identity)), None)


def _call_name(node: Any) -> str:
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def _executorch(model: OpenModel) -> Operators:
    return Operators({}, None)


def _onnx_types(onnx: Any, path: Path) -> dict[str, int]:
    return _counted(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def _counted(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(name for name in names if name not in NO_WORK).items()))


COUNTERS: dict[str, Callable[[OpenModel], Operators]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "torch": _torch,
    "executorch": _executorch,
}
