"""Whole runs on a device that is none: it computes on the CPU, and refuses what would cost time or fail on a GPU.

`fake_device()` gives accelerate a device of the type "lazy", which torch knows and no machine has; its tensors hold
values. As on a GPU, an operation that mixes its tensors with some on the CPU is an error. Copies to the CPU and reads
of a value are counted, and refused inside `hot()`. Values are those of the CPU, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import qtdog
from qtdog.core.config import Config
from qtdog.core.errors import Interrupted
from qtdog.core.progress import StopAfter
from qtdog.data.dataset import DomainSubset
from qtdog.data.known_datasets import RotatedDigits
from qtdog.ensemble.model import load as load_file
from qtdog.objectives.base import DomainOutputs
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.components import Components
from qtdog.training.dart import dart
from qtdog.training.loop import begin_step, update
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, no_health_check, run, train_fork_point

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
        is_hot: whether both are errors.
    """

    n_reads: int = 0
    n_copies: int = 0
    is_hot: bool = False


WATCH = Watch()


def compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values behind its tensors, and refuse what a GPU would."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    here = [value for value in tensors if isinstance(value, OnDevice)]
    target = args[0].device if func is COPY_INTO else kwargs.get("device")
    if func is READ or (func in COPIES and here and target is not None and _is_cpu(target)):
        _count(func)
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


def _count(func: Any) -> None:
    if func is READ:
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


class _Factories(TorchDispatchMode):
    """Lets tensors that are made on the device have values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        here = any(isinstance(value, OnDevice) for value in tree_flatten((args, options))[0])
        made = options.get("device") is not None and torch.device(options["device"]) == DEVICE
        return compute(func, args, options) if here or made else func(*args, **options)


@contextlib.contextmanager
def fake_device() -> Iterator[Watch]:
    """Let accelerate's device be the fake one."""
    before = dict(PartialState._shared_state), dict(AcceleratorState._shared_state)
    WATCH.n_reads = WATCH.n_copies = 0
    PartialState(cpu=True).device = DEVICE
    AcceleratorState._shared_state.clear()
    try:
        with _Factories():
            yield WATCH
    finally:
        for state, saved in zip((PartialState, AcceleratorState), before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(saved)


@contextlib.contextmanager
def hot() -> Iterator[None]:
    """Refuse every copy to the CPU and every read of a value in the block."""
    WATCH.is_hot = True
    try:
        yield
    finally:
        WATCH.is_hot = False


CALM = RunCallbacks(make_health_check=no_health_check, warn=lambda text: None)


def tiny(short_config: Callable[..., Config], digits: DomainSubset, **changes: dict[str, Any]) -> Config:
    data = {"target": "75", "batch_size": 4, "image_size": 8, "workers": 0}
    train = {"steps": 4, "eval_every": 2, "checkpoint_every": 1}
    quantizer = {"name": "lsq", "start_step": 2}
    return resolve(short_config(**({"data": data, "train": train, "quantizer": quantizer} | changes)), digits)


@pytest.fixture
def on_device() -> Iterator[Watch]:
    with fake_device() as watch:
        yield watch


@pytest.fixture(scope="module")
def made() -> dict[str, bytes]:
    """Model files of runs on the CPU, by configuration."""
    return {}


def on_cpu(config: Config, digits: DomainSubset, tmp_path: Path) -> bytes:
    folder = RunFolder(tmp_path / "cpu")
    run(config, digits, folder, callbacks=CALM)
    return folder.model_file.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"averager": {"name": "sma"}, "train": {"steps": 4, "eval_every": 2, "accumulate": 2}},
        {"objective": {"name": "coral"}, "step_rule": {"name": "sam"}, "averager": {"name": "swad"}},
        {"objective": {"name": "groupdro"}},
    ],
    ids=str,
)
def test_a_run_on_the_device_gives_the_file_of_the_cpu(
    changes: dict[str, Any], short_config: Callable[..., Config], three_digits: DomainSubset, tmp_path: Path
):
    """Training, evaluation, averaging, checkpoints, calibration and the check of the file: all with values."""
    config = tiny(short_config, three_digits, **changes)
    expected = on_cpu(config, three_digits, tmp_path)
    folder = RunFolder(tmp_path / "device")
    with fake_device() as watch:
        run(config, three_digits, folder, callbacks=CALM)
    assert folder.model_file.read_bytes() == expected
    assert watch.n_copies > 0


def test_resumed_and_forked_runs_on_the_device_give_it_too(
    short_config: Callable[..., Config], three_digits: DomainSubset, tmp_path: Path
):
    config = tiny(short_config, three_digits)
    expected = on_cpu(config, three_digits, tmp_path)
    stopped, forked = RunFolder(tmp_path / "stopped"), RunFolder(tmp_path / "forked")
    with fake_device():
        stopping = RunCallbacks(StopAfter(3), warn=CALM.warn, make_health_check=no_health_check)
        with pytest.raises(Interrupted):
            run(config, three_digits, stopped, callbacks=stopping)
        run(config, three_digits, stopped, resume=True, callbacks=CALM)
        point = train_fork_point(config, three_digits, RunFolder(tmp_path / "point"), callbacks=CALM)
        run(config, three_digits, forked, fork_from=point, callbacks=CALM)
    assert {value.device.type for part in point.tensors.values() for value in part.values()} == {"cpu"}
    assert stopped.model_file.read_bytes() == expected
    assert forked.model_file.read_bytes() == expected


def test_branches_on_the_device_merge_as_on_the_cpu(
    short_config: Callable[..., Config], three_digits: DomainSubset, tmp_path: Path
):
    configs = [
        tiny(
            short_config,
            three_digits,
            train={"steps": 4, "eval_every": 2, "checkpoint_every": 2, "seed": seed},
            model={"init_seed": 0},
        )
        for seed in range(2)
    ]
    dart(configs, three_digits, tmp_path / "cpu", merge_every=2, callbacks=CALM)
    with fake_device():
        dart(configs, three_digits, tmp_path / "device", merge_every=2, callbacks=CALM)
    files = [RunFolder(tmp_path / name).model_file.read_bytes() for name in ("cpu", "device")]
    assert files[0] == files[1]


def components_on_device(config: Config, digits: DomainSubset, **options: Any) -> Components:
    components = build_components(config, digits, Accelerator(), **options)
    components.network.train()
    return components


def hot_steps(components: Components, n_steps: int = 4) -> None:
    """Make updates, the last of which may neither copy to the CPU nor read a value."""
    for step in range(n_steps):
        begin_step(components, step)
        batch = components.batches.batch(step)
        with hot() if step == n_steps - 1 else contextlib.nullcontext():
            update(components, batch, step)


@pytest.mark.parametrize("name", ["erm", "coral", "mmd", "irm", "vrex", "groupdro", "fishr", "mixup", "rsc"])
def test_no_update_waits_for_the_device(
    name: str, short_config: Callable[..., Config], three_digits: DomainSubset, on_device: Watch
):
    hot_steps(components_on_device(tiny(short_config, three_digits, objective={"name": name}), three_digits))


def test_a_fault_in_the_path_is_found(
    device_fault: Callable[[Tensor], Tensor],
    short_config: Callable[..., Config],
    three_digits: DomainSubset,
    on_device: Watch,
    monkeypatch: pytest.MonkeyPatch,
):
    components = components_on_device(tiny(short_config, three_digits), three_digits)
    loss_of = components.objective.loss

    def loss(domains: list[DomainOutputs]) -> Tensor:
        return device_fault(loss_of(domains))

    monkeypatch.setattr(components.objective, "loss", loss)
    with pytest.raises(FakeDeviceError):
        hot_steps(components)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on the CPU."""
    options: dict[str, Any] = {"steps": 4, "batch_size": 4, "image_size": 12, "eval_every": 2, "progress": False}
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        qtdog.train(target="75", preset=("digits", "lsq"), seed=seed, out=folder, **options)
    return folders


SMALL_ANALYSES: dict[str, dict[str, Any]] = {
    "flatness": {"num_directions": 4, "radii": [3.0], "filter_radii": [], "num_images": 4},
    "hessian": {"num_vectors": 10, "num_eigenvalues": 1, "num_probes": 0, "num_images": 1},
    "surface": {"num_points": 3, "num_images": 4},
    "noise": {},
    "errors": {"num_images": 4, "num_mistakes": 1},
    "cam": {"num_images": 1, "num_shown": 1},
}


@pytest.mark.parametrize("kind", list(SMALL_ANALYSES))
def test_analyses_on_the_device_give_the_numbers_of_the_cpu(kind: str, trained: list[Path], tmp_path: Path):
    measure = getattr(qtdog.analyze, kind)
    found = []
    for name, context in (("cpu", contextlib.nullcontext()), ("device", fake_device())):
        with context:
            found.append(measure([str(trained[0])], **SMALL_ANALYSES[kind], out=tmp_path / name, progress=False))
    expected, measured = (analysis.numbers for analysis in found)
    assert len(measured) == len(expected) > 0
    for one, other in zip(measured, expected, strict=True):
        for key, value in other.items():
            assert one[key] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value)


def test_scores_of_a_file_on_the_device_are_those_on_the_cpu(trained: list[Path], digits: RotatedDigits):
    data = DomainSubset(digits, ["75"])
    expected = qtdog.load(trained[0]).evaluate(data, progress=False).rows()
    with fake_device():
        assert qtdog.load(trained[0]).evaluate(data, progress=False).rows() == expected


def test_a_teacher_goes_to_the_device(
    trained: list[Path], short_config: Callable[..., Config], three_digits: DomainSubset, on_device: Watch
):
    objective = {"teacher": str(trained[0] / "model.safetensors"), "teacher_sha256": "0" * 64}
    data = {"target": "75", "batch_size": 4, "image_size": 12, "workers": 0}
    config = short_config(data=data, objective=objective)
    teacher = load_file(trained[0] / "model.safetensors")
    hot_steps(components_on_device(config, three_digits, teacher=lambda images: teacher.to(images.device)(images)))
