"""The quantizers by name, as the configuration spells them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from qtdog.core.config import AFTER_TRAINING
from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantSpec
from qtdog.core.registry import Registry
from qtdog.quantizers.base import Quantizer, QuantizerOptions
from qtdog.quantizers.controls import AccumulatedNoise, Freeze, FreshNoise, MatchedNoise, NoiseThenRound, Released
from qtdog.quantizers.inq import INQ
from qtdog.quantizers.lsq import LSQ
from qtdog.quantizers.ptq import Fixed
from qtdog.quantizers.ste import STE, DoReFa

QuantizerFactory = Callable[[Tensor, QuantSpec, QuantizerOptions], Quantizer]
"""(weight, spec, options) to a quantizer for that weight, on its device, not yet enabled."""


@dataclass(frozen=True)
class QuantizerKind:
    """One member of the axis.

    Attributes:
        make: builds the quantizer of one weight.
        about: one line for people.
        reads: names of the `QuantizerOptions` that it reads; another one that is set is refused.
    """

    make: QuantizerFactory
    about: str
    reads: frozenset[str] = frozenset()


def _kind(make: QuantizerFactory, about: str, reads: str = "") -> QuantizerKind:
    return QuantizerKind(make, about, frozenset(reads.split()))


_CALIBRATED = "init range calibration_images damping"
_MEMBERS = {
    "lsq": _kind(
        LSQ, "Learned step sizes (Esser et al., 2020): the paper's main quantizer.", "step_mode init range rounding"
    ),
    "ste": _kind(STE, "Plain straight-through rounding to a min-max grid that follows the weight.", "range rounding"),
    "dorefa": _kind(DoReFa, "tanh(w) on a grid without a zero (Zhou et al., 2016)."),
    "inq": _kind(INQ, "Powers of two, frozen share by share (Zhou et al., 2017).", "stages"),
    "noise-accumulated": _kind(AccumulatedNoise, "Control: U(-a, a) added to the weights at every step.", "amplitude"),
    "noise-fresh": _kind(FreshNoise, "Control: U(-a, a) on clean weights in training.", "amplitude"),
    "noise-matched": _kind(MatchedNoise, "Control: U(-s/2, s/2) in training, s as LSQ starts.", "init noise_width"),
    "noise-then-round": _kind(
        NoiseThenRound, "Control: noise as noise-matched in training, rounded afterwards.", "init range noise_width"
    ),
    "freeze": _kind(Freeze, "Control: the layers stop training and stay in float."),
    "released": _kind(Released, "Control: rounded once and frozen, as the paper's released code does."),
    "rtn": _kind(Fixed, "After training: rounded to nearest, the control for gptq and obc.", "init range"),
    "gptq": _kind(
        partial(Fixed, needs_images=True), "After training: column by column (Frantar et al., ICLR 2023).", _CALIBRATED
    ),
    "obc": _kind(
        partial(Fixed, needs_images=True),
        "After training: weight by weight (Frantar et al., NeurIPS 2022): the paper's comparison.",
        _CALIBRATED,
    ),
}
QUANTIZERS: Registry[QuantizerKind] = Registry("quantizer", members=_MEMBERS)


def check_options(name: str, options: QuantizerOptions) -> None:
    """Refuse options that the quantizer called `name` would not read.

    Raises:
        ConfigError: unknown name, or an option at another than its default that it does not read.
    """
    reads = QUANTIZERS[name].reads
    for option in options.changed:
        if option not in reads:
            readers = ", ".join(other for other in QUANTIZERS if option in QUANTIZERS[other].reads)
            known = ", ".join(sorted(reads)) or "none"
            raise ConfigError(f"quantizer '{name}' does not read '{option}' (it is for {readers}); it reads: {known}")


def works_after_training(name: str) -> bool:
    """Return whether the quantizer called `name` works on the finished float model, not during training."""
    return name in AFTER_TRAINING
