"""Training steps on a device without values: a mix of devices, a copy to the CPU or a wait for a value is an error.

Tensors on torch's meta device have shapes and no values. A step on it runs every operation through autograd, and fails
where an operation would mix devices (`Expected all tensors on the same device`), copy to the CPU (`.cpu()`), or read a
value (`.item()`, `bool(tensor)`), which is what makes a GPU wait.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtdog.core.config import AFTER_TRAINING, Config
from qtdog.core.errors import ConfigError
from qtdog.core.registry import Registry
from qtdog.data.known_datasets import RotatedDigits
from qtdog.objectives.base import OBJECTIVES, DomainOutputs
from qtdog.training.build import build_components
from qtdog.training.components import Components, RunState
from qtdog.training.loop import READ_EVERY, TrainingRun, begin_step, update
from support import load_script


class MetaAccelerator:
    """What training asks of an `Accelerator`, on the meta device."""

    device = torch.device("meta")
    num_processes, process_index, is_main_process = 1, 0, True

    def prepare(self, *parts: Any) -> tuple[Any, ...]:
        return parts

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def main_process_first(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


PLAIN = ("fish", "mldg")  # they run the plain network, which has no autocast


def on_meta(config: Config, digits: RotatedDigits) -> Components:
    accelerator: Any = MetaAccelerator()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        return build_components(config, digits, accelerator)


def train_steps(components: Components, n_steps: int = 4) -> TrainingRun:
    """Make updates, of which the last two are quantized, and let the averager follow."""
    run = TrainingRun(components, RunState())
    with contextlib.closing(components.batches.stream(0, n_steps)) as batches:
        for step in range(n_steps):
            if components.quantizer is not None and step == components.start_step:
                components.quantizer.set_enabled(True)  # no values, so no step sizes to find
            batch = next(batches)
            begin_step(components, step)
            loss = update(components, batch, step)
            assert loss.is_meta
            run.after_step(loss, 0.0)
            components.averager.evaluated()
    return run


def needs(section: str, name: str) -> dict[str, Any]:
    """What a member of an axis cannot go without."""
    changes: dict[str, Any] = {section: {"name": name}} if section != "feature_layer" else {}
    if section == "feature_layer":
        changes = {"model": {"feature_layer": name}} | ({"objective": {"name": "arm"}} if name == "context" else {})
    elif name == "arm":
        changes["model"] = {"feature_layer": "context"}
    elif section == "quantizer" and name not in AFTER_TRAINING:
        changes["quantizer"]["start_step"] = 2
    elif section == "quantizer":
        changes["quantizer"]["start_step"] = None
    return changes


MEMBERS: dict[str, Registry[Any]] = load_script("tests/stress/contract.py").MEMBERS


@pytest.mark.stress  # test_fake_device.py has every member in the suite
@pytest.mark.parametrize(("section", "name"), [(axis, name) for axis, known in MEMBERS.items() for name in known])
def test_every_member_of_every_axis_stays_on_the_device(
    section: str, name: str, short_config: Callable[..., Config], digits: RotatedDigits
):
    train_steps(on_meta(short_config(**needs(section, name)), digits))


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(3))
def test_combinations_stay_on_the_device(seed: int, short_config: Callable[..., Config], digits: RotatedDigits):
    rng = random.Random(seed)
    changes: dict[str, Any] = {}
    for section, known in MEMBERS.items():
        if section != "feature_layer":
            changes |= needs(section, rng.choice([name for name in known if name != "arm"]))
    train_steps(on_meta(short_config(**changes), digits))


def test_the_loss_of_a_device_is_read_every_twenty_updates(short_config: Callable[..., Config], digits: RotatedDigits):
    run = train_steps(on_meta(short_config(), digits))
    assert len(run.losses) == 4
    run.losses *= READ_EVERY // 4
    with pytest.raises(RuntimeError, match=r"item|meta"):
        run.read_losses()


def test_a_fault_in_the_path_is_found(
    device_fault: Callable[[Tensor], Tensor],
    short_config: Callable[..., Config],
    digits: RotatedDigits,
    monkeypatch: pytest.MonkeyPatch,
):
    components = on_meta(short_config(), digits)
    loss_of = components.objective.loss

    def loss(domains: list[DomainOutputs]) -> Tensor:
        return device_fault(loss_of(domains))

    monkeypatch.setattr(components.objective, "loss", loss)
    with pytest.raises(RuntimeError, match=r"(?i)meta|same device|no data"):
        train_steps(components)


NEEDS_RANGE = {"_log_softmax", "_softmax", "exp", "log", "nll_loss_forward", "linalg_vector_norm", "var", "std"}
NEEDS_RANGE |= {"var_mean", "std_mean", "pow", "sqrt", "rsqrt", "round", "round_", "logsumexp"}


HALVES = (torch.bfloat16, torch.float16)


class _Types(TorchDispatchMode):
    """Notes which operations that need range or precision get bfloat16 or float16."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.n_half = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        halves = [one for one in tree_leaves(args) if isinstance(one, Tensor) and one.dtype in HALVES]
        name = func.overloadpacket.__name__
        self.n_half += bool(halves)
        if halves and name in NEEDS_RANGE:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


SECTIONS = ("objective", "quantizer", "step_rule", "feature_layer")


@pytest.mark.parametrize(
    ("precision", "section", "name"),
    [
        # float16 is slow on CPUs, and ARM's context of images slower
        pytest.param(bits, axis, name, marks=[pytest.mark.stress] * (bits == "fp16" and name in ("arm", "context")))
        for axis in SECTIONS
        for name in MEMBERS[axis]
        for bits in ("bf16", "fp16")
    ],
)
def test_steps_with_half_the_bits_round_no_loss_no_weight_and_no_step_size(
    precision: str, section: str, name: str, short_config: Callable[..., Config], digits: RotatedDigits
):
    """The network computes in half the bits; losses, norms, quantizers, parameters and gradients are float32."""
    small = {"data": {"target": "75", "batch_size": 2, "image_size": 8}} if precision == "fp16" else {}  # slow on CPUs
    config = short_config(train={"steps": 6, "precision": precision}, **needs(section, name), **small)
    if precision == "fp16" and OBJECTIVES[config.objective.name].OWN_GRADIENTS:
        with pytest.raises(ConfigError, match="takes gradients"):
            build_components(config, digits)
        return
    components = build_components(config, digits)
    for step in range(1, 4):
        begin_step(components, step)
        with _Types() as audit:
            loss = update(components, components.batches.batch(step), step)
        assert torch.isfinite(loss)
        assert audit.found == set()
        assert audit.n_half > 0 or name in PLAIN
    for values in (components.network.parameters(), components.objective.parameters()):
        assert {value.dtype for value in values} <= {torch.float32}
    assert {value.grad.dtype for value in components.network.parameters() if value.grad is not None} == {torch.float32}
