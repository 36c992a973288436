"""A device that is none: it computes on the CPU, and refuses what would cost time or fail on a GPU.

`fake_device()` gives accelerate a device of the type "lazy", which torch knows and no machine has; its tensors hold
values. As on a GPU, an operation that mixes its tensors with some on the CPU is an error. Copies to the CPU, reads of a
value, and copies to the device that wait for what runs there are counted, and refused inside `hot()`. Values are those
of the CPU, bit for bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)
COPY_INTO = torch.ops.aten.copy_.default
COPIES = {torch.ops.aten._to_copy.default, COPY_INTO}
READ = torch.ops.aten._local_scalar_dense.default


class FakeDeviceError(RuntimeError):
    """Something that a GPU would refuse, or wait for where it must not."""


class OnDevice(Tensor):
    """A tensor on the device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Return the values, which costs no read."""
        return f"OnDevice({self.held!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def data_ptr(self) -> int:
        """Return where the values lie, by which a file tells weights of two names from two weights."""
        return self.held.data_ptr()

    def tolist(self) -> Any:
        """Return the values, which is a copy to the CPU."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute on the values."""
        return compute(func, args, dict(kwargs or {}))


@dataclass
class Watch:
    """What the device saw.

    Attributes:
        n_reads: values that were read.
        n_copies: tensors that were copied to the CPU.
        n_uploads: copies to the device for which the host waits, and the host for all that runs there.
        is_hot: whether each is an error.
    """

    n_reads: int = 0
    n_copies: int = 0
    n_uploads: int = 0
    is_hot: bool = False


WATCH = Watch()


def compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values behind its tensors, and refuse what a GPU would."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    here = [value for value in tensors if isinstance(value, OnDevice)]
    target = args[0].device if func is COPY_INTO else kwargs.get("device")
    if func is READ or (func in COPIES and here and target is not None and _is_cpu(target)):
        _count(func)
    elif func in COPIES and not _is_cpu(target or "cpu") and _waits(func, args, kwargs):
        _count(func, is_upload=True)
    elif func not in COPIES and here:
        _refuse_mix(func, tensors)
    on_device = func is not READ and (bool(here) if target is None else not _is_cpu(target))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    known = {id(value.held): value for value in here}
    plain_args, plain_kwargs = tree_map(_held, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)

    def shown(value: Any) -> Any:
        if not isinstance(value, Tensor) or not on_device:
            return value
        found = known.get(id(value))
        return OnDevice(value) if found is None else found  # an operation in place returns what it changed

    return args[0] if func is COPY_INTO else tree_map(shown, result)


def _waits(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a copy to the device comes from the CPU and is not asked to go on its own."""
    given = args[2:3] if func is COPY_INTO else ()
    non_blocking = given[0] if given else kwargs.get("non_blocking", False)
    return not isinstance(args[1 if func is COPY_INTO else 0], OnDevice) and not non_blocking


def _count(func: Any, *, is_upload: bool = False) -> None:
    if is_upload:
        WATCH.n_uploads += 1
    elif func is READ:
        WATCH.n_reads += 1
    else:
        WATCH.n_copies += 1
    if WATCH.is_hot:
        raise FakeDeviceError(f"{func} waits for the device where nothing may")


def _refuse_mix(func: Any, tensors: Sequence[Tensor]) -> None:
    others = [tuple(value.shape) for value in tensors if not isinstance(value, OnDevice) and value.ndim > 0]
    if others:
        raise FakeDeviceError(f"Expected all tensors to be on the same device: {func} has {others} on the CPU")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _is_cpu(device: Any) -> bool:
    return torch.device(device).type == "cpu"


class Factories(TorchDispatchMode):
    """Lets tensors that are made on the device have values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        here = any(isinstance(value, OnDevice) for value in tree_flatten((args, options))[0])
        made = options.get("device") is not None and torch.device(options["device"]) == DEVICE
        return compute(func, args, options) if here or made else func(*args, **options)


class _Constants(TorchFunctionMode):
    """Makes tensors of Python's numbers on the device: made on the CPU and copied, as on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.tensor and options.get("device") is not None and torch.device(options["device"]) == DEVICE:
            del options["device"]
            _count(func, is_upload=True)
            return OnDevice(func(*args, **options))
        return func(*args, **options)


def _generator(device: Any = "cpu", make: Any = torch.Generator) -> torch.Generator:
    return make("cpu" if torch.device(device) == DEVICE else device)


@contextlib.contextmanager
def fake_device() -> Iterator[Watch]:
    """Let accelerate's device be the fake one, in threads that begin in the block too."""
    before = dict(PartialState._shared_state), dict(AcceleratorState._shared_state)
    plain, run_thread = torch.Generator, threading.Thread.run

    def run_with_device(thread: threading.Thread) -> None:
        with _Constants(), Factories():  # modes are of one thread
            run_thread(thread)

    threading.Thread.run = run_with_device  # pyright: ignore[reportAttributeAccessIssue]
    torch.Generator = _generator  # pyright: ignore[reportAttributeAccessIssue]
    torch.lazy = SimpleNamespace(_initialized=False)  # pyright: ignore[reportAttributeAccessIssue]
    WATCH.n_reads = WATCH.n_copies = WATCH.n_uploads = 0
    PartialState(cpu=True).device = DEVICE
    AcceleratorState._shared_state.clear()
    try:
        with _Constants(), Factories():
            yield WATCH
    finally:
        threading.Thread.run = run_thread  # pyright: ignore[reportAttributeAccessIssue]
        torch.Generator = plain
        del torch.lazy  # pyright: ignore[reportAttributeAccessIssue]
        for state, saved in zip((PartialState, AcceleratorState), before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(saved)


@contextlib.contextmanager
def hot() -> Iterator[None]:
    """Refuse every wait for the device in the block."""
    WATCH.is_hot = True
    try:
        yield
    finally:
        WATCH.is_hot = False
