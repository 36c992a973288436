"""Post-training quantization of a finished model: each layer's codes from what the layer sees on calibration images."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from qtdog.conversion.attach import Attached, Site, sites
from qtdog.core.errors import ConfigError, ModelError, unknown
from qtdog.core.quantized import QuantizedTensor
from qtdog.quantizers.ptq import Fixed, gptq, obc, relative_error, row_errors

PATCH_BYTES = 2**26  # of unfolded images that are in memory at a time
CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class HessianRecorder(TorchFunctionMode):
    """A context in which the layers of a model add up their Hessians while it runs.

    It records the calls of `linear` and `conv1d` … `conv3d` themselves, wherever they are made, so that it sees what
    the product really gets: after the padding that a layer does on its own. A call belongs to the layer whose weight
    it is given, or, where the layer changes its weight before it uses it, to the layer that is running if the shape is
    the same. Other operations (attention's packed projection, transposed convolutions, embeddings) are not seen.

    A layer that takes the mean out of its rows of weights (timm's standardized convolutions) does not feel a constant
    that is added to them: its patches are centered, which is the Hessian of its weight to first order.

    Products are in float32, their sums in float64.

    Args:
        model: the model; not changed.
        sites: the layers to watch; of several that share one weight any.

    Attributes:
        hessians: layer name → H, float64, shape (groups, K, K), on the device of its inputs; only of layers seen.

    Example:
        >>> import torch
        >>> from qtdog.conversion.attach import attach, sites
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = attach(model, quantizer="obc")
        >>> with HessianRecorder(model, sites(model)) as recorder:
        ...     _ = model(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> recorder.hessians["weight"].tolist()
        [[[2.0, 4.0], [4.0, 10.0]]]
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site]) -> None:
        super().__init__()
        self.hessians: dict[str, Tensor] = {}
        self._sites = {id(site.weight): site for site in sites}
        self._model = model
        self._running: list[Site] = []
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> HessianRecorder:
        """Watch from here on."""
        for site in self._sites.values():
            owner = self._model.get_submodule(site.plain_name.rpartition(".")[0])
            before = owner.register_forward_pre_hook(partial(self._begin, site))
            after = owner.register_forward_hook(self._end, always_call=True)
            self._hooks.callback(before.remove)
            self._hooks.callback(after.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Watch no more."""
        self._hooks.close()
        super().__exit__(*error)

    def _begin(self, site: Site, module: nn.Module, inputs: Any) -> None:
        self._running.append(site)

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self._running.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at one operation of torch, and do it."""
        kwargs = kwargs or {}
        if func is functional.linear or func in CONVOLUTIONS:
            call = dict(zip(CONVOLUTION_ARGUMENTS, args, strict=False)) | kwargs
            site = self._site_of(call["weight"])
            if site is not None:
                self._add(site, call)
        return func(*args, **kwargs)

    def _site_of(self, weight: Tensor) -> Site | None:
        if id(weight) in self._sites:
            return self._sites[id(weight)]
        if isinstance(weight, nn.Parameter) or not self._running:  # another layer's, which is not watched
            return None
        running = self._running[-1]
        return running if running.weight.shape == weight.shape else None

    def _add(self, site: Site, call: Mapping[str, Any]) -> None:
        center = call["weight"] is not site.weight and removes_mean(call["weight"])
        for rows in patches(call):
            seen = rows.float()
            if center:
                seen = seen - seen.mean(dim=2, keepdim=True)
            product = (seen.mT @ seen).double().mul_(2)
            if site.name in self.hessians:
                self.hessians[site.name].add_(product)
            else:
                self.hessians[site.name] = product


def removes_mean(weight: Tensor) -> bool:
    """Return whether each row of a weight that a layer made for itself sums to zero.

    Example:
        >>> import torch
        >>> removes_mean(torch.tensor([[1.0, -1.0]])), removes_mean(torch.tensor([[1.0, 1.0]]))
        (True, False)
    """
    rows = weight.flatten(1)
    return bool((rows.mean(dim=1).abs() <= 1e-4 * rows.abs().mean(dim=1)).all())


def patches(call: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the inputs of a linear layer or a convolution as rows, (groups, positions, K), in portions.

    A row is what one output position multiplies with a row of weights: K = in_channels / groups · kernel, in the order
    of the flattened weight.

    Args:
        call: the arguments of `torch.nn.functional.linear` or `conv1d` … `conv3d` by name.

    Example:
        >>> import torch
        >>> call = {"input": torch.arange(4.0).reshape(1, 1, 4), "weight": torch.zeros(1, 1, 2)}
        >>> [portion.tolist() for portion in patches(call)]
        [[[[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]]]
    """
    inputs, weight = call["input"], call["weight"]
    if weight.ndim == 2:
        yield inputs.reshape(1, -1, weight.shape[1])
        return
    images = inputs if inputs.ndim == weight.ndim else inputs[None]
    n_dims = weight.ndim - 2
    stride, dilation = (_per_dim(call.get(name, 1), n_dims) for name in ("stride", "dilation"))
    images = _padded(images, weight.shape[2:], dilation, call.get("padding", 0))
    bytes_each = 4 * images[0].numel() * math.prod(weight.shape[2:]) // math.prod(stride)
    for portion in images.split(max(1, PATCH_BYTES // max(1, bytes_each))):
        for dim, (size, step, spread) in enumerate(zip(weight.shape[2:], stride, dilation, strict=True), start=2):
            portion = portion.unfold(dim, spread * (size - 1) + 1, step)[..., ::spread]
        grouped = portion.unflatten(1, (call.get("groups", 1), -1))
        places, kernel = range(3, 3 + n_dims), range(3 + n_dims, 3 + 2 * n_dims)
        yield grouped.permute(1, 0, *places, 2, *kernel).reshape(len(grouped[0]), -1, weight[0].numel())


def _padded(images: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...], padding: Any) -> Tensor:
    if padding == "valid":
        return images
    if padding == "same":  # an odd total puts the larger half behind
        totals = [spread * (size - 1) for size, spread in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(size, size) for size in _per_dim(padding, len(kernel))]
    return functional.pad(images, [size for side in reversed(sides) for size in side])


def _per_dim(value: int | tuple[int, ...], n_dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n_dims if len(values) == 1 else values


METHODS = {"gptq": gptq, "obc": obc}
HESSIAN_BYTES = 2**30  # for the Hessians that are added up in one pass over the images
OBC_COLUMNS = 2048  # beyond this many weights per row, obc's cost (rows · columns³) is out of proportion


class Batches(Protocol):
    """Inputs of a model, like a list of tensors: counted, and gone through as often as it takes."""

    def __len__(self) -> int:
        """Return the number of batches."""
        ...

    def __iter__(self) -> Iterator[Tensor]:
        """Yield one batch after another, on the model's device."""
        ...


@dataclass(frozen=True)
class LayerCalibration:
    """How one layer came to its codes.

    Attributes:
        name: of the layer.
        method: that found its codes.
        why: why it is another method than the one asked for; empty if it is not.
        rounding_error: tr(D H Dᵀ) / tr(W H Wᵀ) with rounding to nearest on the same step sizes: the error of the
            layer's outputs as a share of their energy; None where the inputs were not seen.
        error: the same with the codes found.
        rounded_frac: share of the rows that kept rounding to nearest because it was better.
        seconds: that it took to find them.
    """

    name: str
    method: str
    why: str
    rounding_error: float | None
    error: float | None
    rounded_frac: float
    seconds: float


Outcome = tuple[QuantizedTensor, LayerCalibration]


@dataclass
class _Progress:
    """Counts work, lets the caller show it, and asks whether to go on."""

    total: int
    show: Callable[[int, int], None] | None
    check: Callable[[], None]
    done: int = 0

    def step(self) -> None:
        self.done += 1
        if self.show is not None:
            self.show(self.done, self.total)
        self.check()


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    method: str,
    batches: Batches = (),
    *,
    damping: float = 0.01,
    check: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerCalibration]:
    """Give every quantizer of a float model its codes, and return how each layer came to them.

    `rtn` rounds to nearest and needs no images. `gptq` and `obc` run the float model over `batches` in evaluation mode,
    every layer with the inputs that it has there, so that the order of the layers does not matter. A row of weights
    that rounding to nearest serves better keeps that. Layers whose inputs cannot be seen are rounded.

    Codes that the model has already are forgotten first, and none is set before all are found.

    Args:
        model: carries `Fixed` quantizers (`attach(model, quantizer="obc")`).
        method: `rtn`, `gptq` or `obc`.
        batches: inputs of the model, on its device; gone through several times if the Hessians of all layers together
            need more than `HESSIAN_BYTES`.
        damping: added to the diagonal of each Hessian, as a share of its mean.
        check: called often; may raise to break off.
        progress: is called with (done, total) as the work goes on.

    Raises:
        ConfigError: an unknown method, no images for a method that learns from them, quantizers of another kind, or too
            small a damping.
        ModelError: a weight or an input of a layer is not finite.

    Example:
        >>> from qtdog.conversion.attach import attach
        >>> model = nn.Linear(4, 2)
        >>> _ = attach(model, quantizer="obc", bits=3)
        >>> layer = calibrate_(model, "obc", [torch.randn(50, 4)])[0]
        >>> layer.method, layer.error <= layer.rounding_error
        ('obc', True)
    """
    checked = _checked_sites(model, method, batches)
    Attached(model).set_enabled(False)
    passes = [] if method == "rtn" else plan_passes(model, checked, HESSIAN_BYTES)
    count = _Progress(len(passes) * len(batches) + len(checked), progress, check)
    outcomes: dict[str, Outcome] = {}
    for group in passes:
        hessians = _record(model, group, batches, count)
        for site in group:
            outcomes[site.name] = _solve(site, method, hessians.pop(site.name, None), damping, check)
            count.step()
    for site in checked:
        if site.name not in outcomes:
            why = "" if method == "rtn" else f"its Hessian would take {hessian_bytes(model, site) / 1e9:.1f} GB"
            outcomes[site.name] = _rounded(site, why)
            count.step()
    for site in checked:
        _fixed(site).set_(outcomes[site.name][0])
    return [outcomes[site.name][1] for site in checked]


def _checked_sites(model: nn.Module, method: str, batches: Batches) -> list[Site]:
    """Return one site per weight, if all is as it should be."""
    if method not in ("rtn", *METHODS):
        raise ConfigError(unknown("method after training", method, ("rtn", *METHODS)))
    if method != "rtn" and len(batches) == 0:
        raise ConfigError(f"{method} learns from images: give it some batches")
    first: dict[int, Site] = {}
    for site in sites(model):
        if not isinstance(site.quantizer, Fixed):
            kind = type(site.quantizer).__name__
            raise ConfigError(f"layer '{site.name}' carries {kind}: attach the model with quantizer='{method}'")
        if not torch.isfinite(site.weight).all():
            raise ModelError(f"the weight of layer '{site.name}' is not finite, so it has no codes")
        first.setdefault(id(site.quantizer), site)
    if not first:
        raise ConfigError(f"the model carries no quantizers: attach(model, quantizer='{method}') first")
    return list(first.values())


def plan_passes(model: nn.Module, layers: Iterable[Site], most_bytes: int) -> list[list[Site]]:
    """Return the layers in groups whose Hessians fit into `most_bytes`, without those that alone do not.

    Example:
        >>> from qtdog.conversion.attach import attach
        >>> model = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(9, 1), nn.Linear(5, 1))
        >>> _ = attach(model, quantizer="obc")
        >>> [[site.name for site in group] for group in plan_passes(model, sites(model), 8 * 8 * 8)]
        [['0'], ['1', '3']]
    """
    passes: list[list[Site]] = []
    used = most_bytes
    for site in layers:
        size = hessian_bytes(model, site)
        if size > most_bytes:
            continue
        if used + size > most_bytes:
            passes.append([])
            used = 0
        passes[-1].append(site)
        used += size
    return passes


def hessian_bytes(model: nn.Module, site: Site) -> int:
    """Return the memory that the Hessians of a layer take, in float64: one of its inputs for each group."""
    owner = model.get_submodule(site.plain_name.rpartition(".")[0])
    groups: Any = getattr(owner, "groups", 1)
    return 8 * groups * site.weight[0].numel() ** 2


def _record(model: nn.Module, group: list[Site], batches: Batches, count: _Progress) -> dict[str, Tensor]:
    was_training = model.training
    model.eval()
    try:
        with HessianRecorder(model, group) as recorder, parametrize.cached():
            for images in batches:
                model(images)
                count.step()
    finally:
        model.train(was_training)
    return recorder.hessians


def _solve(site: Site, method: str, hessian: Tensor | None, damping: float, check: Callable[[], None]) -> Outcome:
    """Return codes and report of a layer with this Hessian.

    Neither method is sure to beat rounding: with few weights per row the last ones have none left to make up for them.
    """
    if hessian is None:
        return _rounded(site, "its inputs were not seen")
    if not torch.isfinite(hessian).all():
        raise ModelError(f"the inputs of layer '{site.name}' are not finite: the float model is broken")
    started = time.perf_counter()
    rounded = _fixed(site).rounded(site.weight)
    rows = site.weight.detach().flatten(1)
    scale, nearest = rounded.scale.expand(len(rows)), rounded.codes.flatten(1)
    used, why = method, ""
    if method == "obc" and rows.shape[1] > OBC_COLUMNS:
        used, why = "gptq", f"{rows.shape[1]:,} weights per row; beyond {OBC_COLUMNS:,} obc takes gptq's order"
    try:
        codes = METHODS[used](rows, hessian, scale, rounded.spec, damping=damping, check=check)
    except ConfigError as error:
        raise ConfigError(f"layer '{site.name}': {error}") from error
    before, after = (found * scale[:, None] - rows for found in (nearest, codes))
    worse = row_errors(after, hessian) > row_errors(before, hessian)
    chosen = torch.where(worse[:, None], nearest, codes)
    report = LayerCalibration(
        name=site.name,
        method=used,
        why=why,
        rounding_error=relative_error(before, rows, hessian),
        error=relative_error(chosen * scale[:, None] - rows, rows, hessian),
        rounded_frac=worse.double().mean().item(),
        seconds=round(time.perf_counter() - started, 3),
    )
    shaped = rounded.codes.copy_(chosen.reshape(rounded.codes.shape))  # keeps the memory format
    return QuantizedTensor(shaped, rounded.scale, rounded.spec), report


def _rounded(site: Site, why: str) -> Outcome:
    """Return codes and report of a layer that is rounded to nearest."""
    return _fixed(site).rounded(site.weight), LayerCalibration(site.name, "rtn", why, None, None, 1.0, 0.0)


def _fixed(site: Site) -> Fixed:
    assert isinstance(site.quantizer, Fixed)
    return site.quantizer
