"""Averagers: which weights are kept (none, SWA, SMA, EMA, BMA), or begun with; SWAD has a file of its own."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qtdog.conversion.attach import sites
from qtdog.core.config import Config
from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantSpec
from qtdog.core.registry import HyperParameter, HyperParameters, Registry, Value, fill
from qtdog.quantizers.lsq import LSQ
from qtdog.quantizers.step_size_init import initial_scale

State = dict[str, Tensor]


class Averager(ABC):
    """Watches the weights and says which ones are evaluated and kept; abstract.

    Everything is over the network's state dict: latent weights, step sizes and buffers. The average is of the floating
    point entries; others (INQ's masks, batch counters) are not in it, so that they stay those of the last update. Step
    sizes learned on a log scale are averaged as they are: it is their geometric mean. Only weights that could be saved
    count (`Components.selectable`): none before the start step, with INQ none before the last stage.

    Attributes:
        HYPERPARAMETERS: name → default, search range, meaning.
        READS_HELDOUT: whether it follows the loss on the held-out source images.
        params: their values.
        start: the first number of updates after which weights may count: 0, or the start step of a quantized run, since
            step sizes mean nothing before it.
        begin: number of the first update that counts.
        n_steps: updates of the whole run, set by `make_averager`.
        COUNTS_FLOAT: whether weights before the start step of a quantized run count.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {}
    READS_HELDOUT: ClassVar[bool] = False
    COUNTS_FLOAT: ClassVar[bool] = False

    def __init__(self, params: Mapping[str, Value], start: int) -> None:
        self.params = fill(f"averager '{AVERAGERS.name_of(type(self))}'", self.HYPERPARAMETERS, params)
        self.start = start
        self.begin = start + 1
        self.n_steps = 0

    @abstractmethod
    def after_step(self, step: int, network: nn.Module) -> None:
        """Take note of the weights after update number `step` (1 is the first), which could be saved."""

    def after_evaluation(self, step: int, source_loss: float) -> None:  # noqa: B027  (most members do nothing)
        """Take note of the mean loss on the held-out source images at `step`."""

    @abstractmethod
    def evaluated(self) -> State | None:
        """Return what an evaluation during training should measure; None for the weights as they are."""

    def final(self) -> State | None:
        """Return what is saved at the end whatever selection says; None to save the selected checkpoint."""
        return None

    def hand_over(self) -> State | None:
        """Return the weights with which quantization begins, as it begins; None to go on with those of training."""
        return None

    def kept(self, step: int) -> str:
        """Return in words what is saved, if selection chose the evaluation after update `step`."""
        return f"weights after update {step}"

    def state(self) -> tuple[State, dict[str, Any]]:
        """Return the averager's own state for a checkpoint: tensors, and what JSON can hold."""
        return {}, {}

    def restore(self, tensors: State, extra: dict[str, Any]) -> None:  # noqa: B027  (a member without state)
        """Put back what `state` returned."""


AVERAGERS: Registry[type[Averager]] = Registry("averager")


@AVERAGERS.register("none")
class NoAverage(Averager):
    """The weights as they are."""

    def after_step(self, step: int, network: nn.Module) -> None:
        """No average is kept."""

    def evaluated(self) -> State | None:
        """The weights as they are."""
        return None


def snapshot(network: nn.Module) -> State:
    """Return a copy of the network's state on the CPU, latent weights and step sizes included."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}


@contextlib.contextmanager
def swapped(network: nn.Module, state: State | None) -> Iterator[None]:
    """Let the network have other weights inside the block, and its own again after it; None changes nothing.

    Entries that `state` lacks stay as they are.
    """
    if state is None:
        yield
        return
    own = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(state, strict=False)
    try:
        yield
    finally:
        network.load_state_dict(own)
        del own


def float_names(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the entries that can be averaged.

    Example:
        >>> import torch
        >>> float_names({"w": torch.zeros(1), "n": torch.zeros(1, dtype=torch.int64)})
        ['w']
    """
    return [name for name, value in state.items() if value.is_floating_point()]


class Average:
    """The mean of a network's floating point state over some updates, float32, on the device of the network.

    Formula: θ̂ += (θ - θ̂) / n. Each of its three operations is rounded by itself, so that the result does not depend on
    how tensors lie in memory, and an entry that never changes stays what it is, bit for bit.

    Attributes:
        mean: entry name → mean; empty before the first.
        n: how many were averaged.
        first: number of the first update.
        last: number of the last update.

    Example:
        >>> average = Average()
        >>> average.add_(5, {"w": torch.tensor(1.0)})
        >>> average.add_(6, {"w": torch.tensor(2.0)})
        >>> average.mean["w"].item(), average.n, average.first, average.last
        (1.5, 2, 5, 6)
    """

    def __init__(self) -> None:
        self.mean: State = {}
        self.n = 0
        self.first = 0
        self.last = 0

    @torch.no_grad()
    def add_(self, step: int, state: Mapping[str, Tensor], share: float | None = None) -> None:
        """Count the state after update number `step`, moving 1/share of the way to it; default: the plain mean."""
        self.first, self.last = self.first or step, step
        self.n += 1
        for name in float_names(state):
            self._pull_(name, state[name].detach(), share or self.n)

    def add_network_(self, step: int, network: nn.Module, share: float | None = None) -> None:
        """Count a network's state after update number `step`; `share` as in `add_`."""
        self.add_(step, network.state_dict(), share)

    def on_grid(self) -> State:
        """Return what a network should have to be evaluated: the mean."""
        return self.mean

    @torch.no_grad()
    def merge_(self, other: Average) -> None:
        """Count everything that `other` counted, later updates than these."""
        if not other.n:
            return
        self.first, self.last = self.first or other.first, other.last
        self.n += other.n
        for name, value in other.mean.items():
            self._pull_(name, value, self.n / other.n)

    def _pull_(self, name: str, value: Tensor, share: float) -> None:
        """Move the mean of one entry towards `value` by 1/share of the way."""
        if name not in self.mean:
            self.mean[name] = value.to(torch.float32, copy=True)
            return
        mean = self.mean[name] = self.mean[name].to(value.device)  # one from a checkpoint lies on the CPU
        mean += (value.float() - mean).div_(share)

    def tensors(self, prefix: str) -> State:
        """Return the mean under names that begin with `prefix`, for a checkpoint."""
        return {f"{prefix}{name}": value for name, value in self.mean.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the rest of what a checkpoint needs."""
        return {"n": self.n, "first": self.first, "last": self.last}

    @classmethod
    def restored(cls, prefix: str, tensors: State, saved: Mapping[str, Any]) -> Average:
        """Return the average that `tensors` and `to_json` described (KeyError if `saved` lacks something)."""
        average = cls()
        average.mean = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        average.n, average.first, average.last = saved["n"], saved["first"], saved["last"]
        return average

    def __str__(self) -> str:
        """Return what was averaged, in words."""
        return f"average of updates {self.first} to {self.last}"


WEIGHTS = HyperParameter(
    "latent",
    "what is averaged: latent weights and step sizes, or dequantized weights, to which step sizes are refitted",
    choices=("latent", "dequantized"),
)
STEP_SIZES = {"log": "log_scale", "raw": "scale", "frozen": "start_scale"}  # where LSQ keeps them, by mode


class DequantizedAverage(Average):
    """The mean of dequantized weights, on the grid that fits it with the least squared error.

    The mean of weights on a grid lies between its points. What is evaluated and kept is that mean, with the step sizes
    that round it with the least squared error (`step_size_init.mse_init`); what is not quantized is averaged as it is.
    It is for LSQ, whose step sizes are free.

    Attributes:
        grids: prefix of a quantizer's entries in the state dict → its grid and mode, as JSON has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grids: dict[str, dict[str, Any]] = {}

    @torch.no_grad()
    def add_network_(self, step: int, network: nn.Module, share: float | None = None) -> None:
        """Count the weights that the network computes with after update number `step`."""
        state = dict(network.state_dict())
        for site in sites(network):
            if not site.quantizer.enabled:
                continue
            if not isinstance(site.quantizer, LSQ):
                raise ConfigError("averages of dequantized weights refit step sizes, which only lsq has free")
            spec = site.quantizer.spec
            grid = {"bits": spec.bits, "axis": spec.axis, "levels": spec.levels, "groups": spec.groups}
            self.grids[site.prefix] = grid | {"mode": site.quantizer.step_mode}
            state[f"{site.prefix}original"] = site.quantizer.quantized(site.weight).dequantize()
        self.add_(step, state, share)

    @torch.no_grad()
    def on_grid(self) -> State:
        """Return the mean, with refitted step sizes; empty before the first update that counts."""
        found = dict(self.mean)
        if not found:
            return found
        for prefix, saved in self.grids.items():
            mode, spec = saved["mode"], QuantSpec(**{key: value for key, value in saved.items() if key != "mode"})
            scale = initial_scale(found[f"{prefix}original"], spec, "mse")
            found[f"{prefix}0.{STEP_SIZES[mode]}"] = scale.log() if mode == "log" else scale
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the rest of what a checkpoint needs."""
        return super().to_json() | {"grids": self.grids}

    @classmethod
    def restored(cls, prefix: str, tensors: State, saved: Mapping[str, Any]) -> DequantizedAverage:
        """Return the average that `tensors` and `to_json` described."""
        average = super().restored(prefix, tensors, saved)
        assert isinstance(average, cls)
        average.grids = {name: dict(grid) for name, grid in saved.get("grids", {}).items()}
        return average


def new_average(params: Mapping[str, Value]) -> Average:
    """Return an empty average of what `params["weights"]` says."""
    return DequantizedAverage() if params.get("weights") == "dequantized" else Average()


@AVERAGERS.register("swa")
class SWA(Averager):
    """The mean of every n-th update from a fixed one on; it is saved whatever selection says (Izmailov et al., 2018).

    Formula: θ̂ = 1/K · Σ_k θ_(b + k·every), k = 0 … K - 1, with b = max(start, first update that may count). The paper
    averages the end of each cycle of a cyclic learning rate, or one in several steps of a constant one, which is the
    protocol's; the choice of b and of `every` (an epoch of PACS is about 50 steps) is ours. Evaluations during the run
    are of the weights as they are. A run that ends before b saves the selected checkpoint.

    Example:
        >>> import torch
        >>> network, swa = nn.Linear(1, 1, bias=False), SWA({"start": 2, "every": 2}, 0)
        >>> for step in range(1, 6):
        ...     _ = network.weight.data.fill_(step)
        ...     swa.after_step(step, network)
        >>> swa.final()["weight"].item(), swa.kept(5)  # of 2 and 4
        (3.0, 'average of updates 2 to 4, every 2')
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "start": HyperParameter(100, "first update that counts", low=0),
        "every": HyperParameter(50, "updates from one that counts to the next", low=1),
        "weights": WEIGHTS,
    }

    def __init__(self, params: Mapping[str, Value], start: int) -> None:
        super().__init__(params, start)
        self.begin = max(int(self.params["start"]), start + 1)
        self.every = int(self.params["every"])
        self.average = new_average(self.params)

    def after_step(self, step: int, network: nn.Module) -> None:
        """Count the weights if it is their turn."""
        if step >= self.begin and (step - self.begin) % self.every == 0:
            self.average.add_network_(step, network)

    def evaluated(self) -> State | None:
        """The weights as they are."""
        return None

    def final(self) -> State | None:
        """Return the average, or None before the first update that counts."""
        return self.average.on_grid() or None

    def kept(self, step: int) -> str:
        """Return in words what is saved."""
        if self.average.n:
            return f"{self.average}, every {self.every}"
        return f"{super().kept(step)} (the run ended before update {self.begin}, from which swa averages)"

    def state(self) -> tuple[State, dict[str, Any]]:
        """Return the average."""
        return self.average.tensors(""), self.average.to_json()

    def restore(self, tensors: State, extra: dict[str, Any]) -> None:
        """Put back what `state` returned (KeyError if something is missing)."""
        self.average = type(self.average).restored("", tensors, extra)


@AVERAGERS.register("sma")
class SMA(Averager):
    """The mean of all updates from an early one on, selected in place of the weights (Arpit et al., 2022).

    Formula: θ̂_t = ((t - t0) · θ̂_(t-1) + θ_t) / (t - t0 + 1) for t ≥ t0, θ̂_t = θ_t before (Eq. 1); t0 = 100, or the
    first update that may count if that is later. Every evaluation is of θ̂, so selection by source validation chooses
    among the averages, as the paper does.

    Example:
        >>> import torch
        >>> network, sma = nn.Linear(1, 1, bias=False), SMA({"start": 2}, 0)
        >>> for step in range(1, 5):
        ...     _ = network.weight.data.fill_(step)
        ...     sma.after_step(step, network)
        >>> sma.evaluated()["weight"].item(), sma.kept(4)  # of 2, 3 and 4
        (3.0, 'average of updates 2 to 4')
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "start": HyperParameter(100, "t0, the first update that counts", low=0),
        "weights": WEIGHTS,
    }

    def __init__(self, params: Mapping[str, Value], start: int) -> None:
        super().__init__(params, start)
        self.begin = max(int(self.params["start"]), start + 1)
        self.average = new_average(self.params)

    def after_step(self, step: int, network: nn.Module) -> None:
        """Count the weights, from t0 on."""
        if step >= self.begin:
            self.average.add_network_(step, network, self._share())

    def _share(self) -> float | None:
        """Return 1 / the share of the way that the mean moves to new weights; None for the plain mean."""
        return None

    def evaluated(self) -> State | None:
        """Return the average so far, or None before t0."""
        return self.average.on_grid() or None

    def kept(self, step: int) -> str:
        """Return in words what is saved, if selection chose the evaluation after update `step`."""
        if self.average.n and step >= self.average.first:
            return f"average of updates {self.average.first} to {step}"
        return f"{super().kept(step)} (chosen before update {self.begin}, from which sma averages)"

    def state(self) -> tuple[State, dict[str, Any]]:
        """Return the average."""
        return self.average.tensors(""), self.average.to_json()

    def restore(self, tensors: State, extra: dict[str, Any]) -> None:
        """Put back what `state` returned (KeyError if something is missing)."""
        self.average = type(self.average).restored("", tensors, extra)


@AVERAGERS.register("ema")
class EMA(SMA):
    """The exponential mean of all updates from an early one on, selected in place of the weights (as in timm).

    Formula: θ̂_t = d · θ̂_(t-1) + (1 - d) · θ_t for t > t0, θ̂_t0 = θ_t0 (Polyak averaging as Szegedy et al., CVPR 2016,
    use it; timm's ModelEmaV3 without warm-up). Its mean age is 1 / (1 - d) updates. As with SMA every evaluation is
    of the average.

    Example:
        >>> import torch
        >>> network, ema = nn.Linear(1, 1, bias=False), EMA({"start": 1, "decay": 0.5}, 0)
        >>> for step in (1, 2):
        ...     _ = network.weight.data.fill_(step)
        ...     ema.after_step(step, network)
        >>> ema.evaluated()["weight"].item()
        1.5
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "start": HyperParameter(100, "t0, the first update that counts", low=0),
        "decay": HyperParameter(
            0.999, "d, the share of the average that stays", low=0.0, high=0.99999, search=(0.9, 0.9999)
        ),
        "weights": WEIGHTS,
    }

    def _share(self) -> float | None:
        return 1 / (1 - float(self.params["decay"]))

    def kept(self, step: int) -> str:
        """Return in words what is saved, if selection chose the evaluation after update `step`."""
        text = super().kept(step)
        return f"exponential {text}" if text.startswith("average") else text.replace("from which sma", "from which ema")


@AVERAGERS.register("bma")
class BMA(Averager):
    """The mean of all updates, both ends counting most; it is saved whatever selection says (Shu et al., 2023).

    Formula: θ̂ = Σ_k a_k θ_k / Σ_k a_k over the K updates that may count, k = 0 … K - 1, with a_k the density of
    Beta(β, β) at (k + 0.5) / K, which is proportional to (x (1 - x))^(β - 1). The paper's first θ is the pretrained
    network itself, ours the one after the first update that may count: of thousands its share is below 1 %.
    Evaluations during the run are of the weights as they are. A run that stops early has no average that means this.

    Example:
        >>> import torch
        >>> network, bma = nn.Linear(1, 1, bias=False), BMA({"beta": 1.0}, 0)
        >>> bma.n_steps = 3
        >>> for step in range(1, 4):
        ...     _ = network.weight.data.fill_(step)
        ...     bma.after_step(step, network)
        >>> bma.final()["weight"].item(), bma.kept(3)  # with β = 1 all count alike
        (2.0, 'Beta average of updates 1 to 3')
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "beta": HyperParameter(0.5, "β: below 1 both ends count most, at 1 all alike", low=0.01, high=10.0),
    }

    def __init__(self, params: Mapping[str, Value], start: int) -> None:
        super().__init__(params, start)
        self.average = Average()
        self.total = 0.0

    def after_step(self, step: int, network: nn.Module) -> None:
        """Count the weights by their place in the run."""
        if step < self.begin:
            return
        place = (step - self.begin + 0.5) / (max(self.n_steps, step) - self.begin + 1)
        weight = (place * (1 - place)) ** (float(self.params["beta"]) - 1)
        self.total += weight
        self.average.add_(step, network.state_dict(), self.total / weight)

    def evaluated(self) -> State | None:
        """The weights as they are."""
        return None

    def final(self) -> State | None:
        """Return the average, or None before the first update that counts."""
        return self.average.mean or None

    def kept(self, step: int) -> str:
        """Return in words what is saved."""
        return f"Beta {self.average}" if self.average.n else super().kept(step)

    def state(self) -> tuple[State, dict[str, Any]]:
        """Return the average and the sum of its weights."""
        return self.average.tensors(""), self.average.to_json() | {"total": self.total}

    def restore(self, tensors: State, extra: dict[str, Any]) -> None:
        """Put back what `state` returned (KeyError if something is missing)."""
        self.average, self.total = Average.restored("", tensors, extra), extra["total"]


class FloatPhase(Averager):
    """An averager of the float steps alone: quantization begins with its average (`quantizer.start_from`).

    Evaluations before the start step are of the average. At the start step the network gets it, and batch norm that
    learns its statistics is measured anew; the optimizer's moments stay, as scales of the gradients. From there on
    nothing is averaged, and selection chooses among the quantized weights as they are.

    Args:
        inner: averages; it counts from its own start on.
        start: the start step.

    Raises:
        ConfigError: the inner averager weighs by the length of the run.
    """

    COUNTS_FLOAT: ClassVar[bool] = True

    def __init__(self, inner: Averager, start: int) -> None:
        if isinstance(inner, (NoAverage, BMA)):
            name = AVERAGERS.name_of(type(inner))
            raise ConfigError(
                f"quantizer.start_from=average begins with the average of the float steps, and averager '{name}' has "
                "none that is ready there: take sma, ema, swa or swad"
            )
        self.inner, self.start, self.begin = inner, start, inner.begin
        self.params, self.n_steps = inner.params, inner.n_steps
        self.began_with = ""

    def after_step(self, step: int, network: nn.Module) -> None:
        """Count the weights, up to the start step."""
        if step <= self.start:
            self.inner.after_step(step, network)

    def after_evaluation(self, step: int, source_loss: float) -> None:
        """Tell the inner averager, up to the start step."""
        if step <= self.start:
            self.inner.after_evaluation(step, source_loss)

    def evaluated(self) -> State | None:
        """Return the average so far in the float steps; then None."""
        return None if self.began_with else self.inner.evaluated()

    def hand_over(self) -> State | None:
        """Return the average and let go of it; None if there is none."""
        final = self.inner.final()
        state = self.inner.evaluated() if final is None else final
        self.began_with = self.inner.kept(self.start)
        self.inner = NoAverage({}, 0)
        return state

    def kept(self, step: int) -> str:
        """Return in words what is saved, if selection chose the evaluation after update `step`."""
        return f"{super().kept(step)}, quantization having begun with: {self.began_with}"

    def state(self) -> tuple[State, dict[str, Any]]:
        """Return the inner averager's state, and whether its average was handed over."""
        tensors, extra = self.inner.state()
        return tensors, extra | {"began_with": self.began_with}

    def restore(self, tensors: State, extra: dict[str, Any]) -> None:
        """Put back what `state` returned, or the state of the inner averager in a float run."""
        self.began_with = extra.get("began_with", "")
        if self.began_with:
            self.inner = NoAverage({}, 0)
        self.inner.restore(tensors, extra)


def make_averager(config: Config) -> Averager:
    """Return the averager that a configuration names.

    Raises:
        ConfigError: an unknown name or parameter, one that follows held-out images where none are left, one whose
            average cannot be what quantization begins with, or dequantized weights of a quantizer without free step
            sizes.
    """
    name, quantizer = config.averager.name, config.quantizer
    if AVERAGERS[name].READS_HELDOUT and config.data.train_on_heldout:
        raise ConfigError(f"averager '{name}' follows the held-out images' loss; data.train_on_heldout leaves none")
    phases = quantizer.start_from == "average" and config.start_step is not None
    averager = AVERAGERS[name](config.averager.params, 0 if phases else config.start_step or 0)
    averager.n_steps = config.train.steps
    if averager.params.get("weights") == "dequantized" and quantizer.name not in ("lsq", "none"):
        raise ConfigError(
            f"averager.params weights=dequantized refits step sizes, and quantizer '{quantizer.name}' has no free ones"
            ": take lsq, or weights=latent"
        )
    if phases and averager.begin > (config.start_step or 0):
        raise ConfigError(
            f"quantizer.start_from=average: averager '{name}' counts from update {averager.begin} on, and quantization "
            f"begins at step {config.start_step}; set averager.params start lower"
        )
    return FloatPhase(averager, config.start_step or 0) if phases else averager
