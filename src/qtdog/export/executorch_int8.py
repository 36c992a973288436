"""ExecuTorch in integers: PyTorch's quantizer for XNNPACK with our codes, step sizes and ranges in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qtdog.core.errors import ModelError
from qtdog.core.progress import Progress
from qtdog.core.quantized import QuantizedTensor
from qtdog.export.inference_module import InferenceModule
from qtdog.export.int8 import N_BINS, best_activation_range
from qtdog.export.integer_weight import fit, seven_bits
from qtdog.export.onnx_graph import quiet, unsupported
from qtdog.export.packed_source import PackedSource, library

PT2E = "torchao.quantization.pt2e"
PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Linear)


def integer_networks(
    source: PackedSource, pixels: npt.NDArray[np.uint8], progress: Progress = None
) -> tuple[list[nn.Module], list[str], tuple[int, int]]:
    """Return a packed model's networks with rounded activations and integer weights, as XNNPACK takes them.

    Batch norm is folded by PyTorch; the codes stay, the step sizes take its factor. Activations are int8 with the range
    of least squared error (`export.int8.best_activation_range`). Layers without codes stay float.

    Args:
        source: the packed model.
        pixels: source images that set the ranges, uint8 (n, H, W, C).
        progress: called with networks done and to do.

    Returns:
        The networks, weights that had to be rounded again, products in integers and all of them.

    Raises:
        ModelError: executorch is not installed, activations were rounded in training, a network cannot be exported, or
            none of its products can become integer.
    """
    if any(info.activations for info in source.infos):
        raise ModelError(f"{source.path} rounds activations as trained, which the format 'executorch-int8' cannot hold")
    with quiet():  # torchao logs what it registers
        library(f"{PT2E}.quantize_pt2e")
    module = source.module()
    made: list[nn.Module] = []
    rounded: list[str] = []
    n_integer = n_products = 0
    for index, network in enumerate(list(module.members)):
        codes = source.members[index].quantized
        found, again, n_here = _quantized(network, codes, module, pixels, source)
        made.append(found)
        rounded += [f"members.{index}.{name}" for name in again]
        n_integer += n_here
        n_products += sum(isinstance(layer, PRODUCTS) for layer in network.modules())
        if progress is not None:
            progress(index + 1, len(module.members))
    if not n_integer:
        text = f"{source.path}: none of its {n_products} products could become integer for XNNPACK"
        raise ModelError(f"{text}. Export to a float format")
    return made, rounded, (n_integer, n_products)


def _quantized(
    network: nn.Module,
    codes: Mapping[str, QuantizedTensor],
    module: InferenceModule,
    pixels: npt.NDArray[np.uint8],
    source: PackedSource,
) -> tuple[nn.Module, list[str], int]:
    pt2e, steps = library(PT2E), library(f"{PT2E}.quantize_pt2e")
    activations, weights = _activation_observer(), _weight_observer(codes)
    inputs = module.prepare(torch.from_numpy(pixels[:1]))
    try:
        with quiet(), torch.no_grad():
            graph = torch.export.export(network, (inputs,)).module()
            prepared = steps.prepare_pt2e(graph, _quantizer(network, codes, activations, weights))
            clip_observers_(prepared, activations)
            for counting in (False, True):
                for observer in prepared.modules():
                    if isinstance(observer, activations):
                        observer.counting = counting
                for image in torch.from_numpy(pixels).split(1):
                    prepared(module.prepare(image))
            seen = [observer for observer in prepared.modules() if isinstance(observer, weights)]
            converted = steps.convert_pt2e(prepared)
            pt2e.allow_exported_model_train_eval(converted)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"{source.path} cannot be quantized for ExecuTorch: {unsupported(error)}") from error
    return converted, sorted(observer.name for observer in seen if not observer.exact), len(seen)


CLIPS = {"hardtanh": (-1.0, 1.0), "hardtanh_": (-1.0, 1.0), "relu6": (0.0, 6.0), "relu6_": (0.0, 6.0)}
"""Operators that clip between constants, with the bounds that hold where the call gives none."""


def clip_observers_(prepared: Any, observers: type[Any]) -> int:
    """Give an observer whose value is only clipped afterwards the clip's bounds, in place; return how many got them.

    XNNPACK's quantizer rounds a convolution's output before ReLU6. A range that ends where ReLU6 ends loses nothing.

    Args:
        prepared: graph module with observers.
        observers: the class of those that take `bounds`.
    """
    n = 0
    for node in prepared.graph.nodes:
        observer: Any = prepared.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(observer, observers) or len(node.users) != 1:
            continue
        (user,) = node.users
        name = str(user.target).removeprefix("aten.").partition(".")[0]
        if name in CLIPS:
            low, high = (*user.args[1:3], *CLIPS[name][len(user.args) - 1 :])
            observer.bounds = (float(low), float(high))
            n += 1
    return n


def _quantizer(network: nn.Module, codes: Mapping[str, QuantizedTensor], activations: Any, weights: Any) -> Any:
    """Return XNNPACK's quantizer for the layers that have codes."""
    quantizers = library(f"{PT2E}.quantizer")
    activation = quantizers.QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        is_dynamic=False,
        observer_or_fake_quant_ctr=activations.with_args(),
    )
    weight = quantizers.QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        is_dynamic=False,
        observer_or_fake_quant_ctr=weights.with_args(),
    )
    left = {
        name for name, layer in network.named_modules() if isinstance(layer, PRODUCTS) and f"{name}.weight" not in codes
    }

    def has_codes(node: Any) -> bool:
        """Whether an operator is not of a layer that stays float."""
        paths = [str(path).removeprefix("L['self'].") for path, _ in node.meta.get("nn_module_stack", {}).values()]
        return not (paths and paths[-1] in left)

    quantizer = library("executorch.backends.xnnpack.quantizer.xnnpack_quantizer").XNNPACKQuantizer()
    quantizer.set_global(quantizers.QuantizationConfig(activation, activation, weight, None, False))
    return quantizer.set_filter_function(has_codes)


def _activation_observer() -> Any:
    """Return what chooses the range of an activation, as a class of the library that calls it."""

    class ActivationObserver(library(PT2E).MinMaxObserver):
        """Extremes in a first pass, a histogram between them in a second one."""

        counting = False
        bounds: tuple[float, float] | None = None
        histogram: Tensor | None = None

        def ends(self) -> tuple[float, float]:
            return min(float(self.min_val), 0.0), max(float(self.max_val), 0.0)

        def forward(self, x: Tensor) -> Tensor:
            values = x.detach().float() if self.bounds is None else x.detach().float().clamp(*self.bounds)
            low, high = self.ends() if self.counting else (0.0, 0.0)
            if not self.counting:
                super().forward(values)
            elif low < high:
                counts = torch.histc(values.reshape(-1), N_BINS, low, high)
                self.histogram = counts if self.histogram is None else self.histogram + counts
            return x

        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            counts = torch.zeros(N_BINS) if self.histogram is None else self.histogram
            found = best_activation_range(counts, *self.ends())
            return torch.tensor([found.scale]), torch.tensor([found.zero_point - 128])

    return ActivationObserver


def _weight_observer(codes: Mapping[str, QuantizedTensor]) -> Any:
    """Return what gives a weight its step sizes, as a class of the library that calls it."""

    class WeightObserver(library(PT2E).PerChannelMinMaxObserver):
        """The step sizes of the codes behind a weight that batch norm was folded into."""

        name, exact = "", True

        def forward(self, x: Tensor) -> Tensor:
            self.weight = x.detach()
            return super().forward(x)

        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            weight = self.weight.contiguous().numpy()
            for name, value in codes.items():
                found = fit(weight, value)
                if found is not None and found.axis == 0:
                    _, scale, self.exact = seven_bits(found)
                    self.name = name
                    return torch.from_numpy(scale), torch.zeros(len(scale), dtype=torch.int64)
            raise ValueError(f"a weight of shape {tuple(weight.shape)} has no codes")

    return WeightObserver
