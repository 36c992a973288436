"""What each layer multiplies its weight with, summed up as H = 2 X Xᵀ."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qtdog.conversion.attach import Site

PATCH_BYTES = 2**26  # of unfolded images that are in memory at a time
CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class HessianRecorder(TorchFunctionMode):
    """A context in which the layers of a model add up their Hessians while it runs.

    It watches the calls of `linear` and `conv1d` … `conv3d` themselves, so that it sees what the product really gets:
    after the padding that a layer does on its own, and whoever makes the call. A call belongs to the layer whose weight
    it is given, or, where the layer changes its weight before it uses it, to the layer that is running if the shape is
    the same. Other operations (attention's packed projection, transposed convolutions, embeddings) are not seen.

    A layer that takes the mean out of its rows of weights (timm's standardized convolutions) does not feel a constant
    that is added to them: its patches are centred, which is the Hessian of its weight to first order.

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
        >>> with HessianRecorder(model, list(sites(model))) as recorder:
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
        centre = call["weight"] is not site.weight and removes_mean(call["weight"])
        for rows in patches(call):
            seen = rows.float()
            if centre:
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
