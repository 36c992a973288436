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


QUANTIZERS: Registry[QuantizerKind] = Registry("quantizer")


def add(name: str, make: QuantizerFactory, about: str, reads: str = "") -> None:
    """Enter a quantizer under `name`; `reads` lists its options, separated by spaces."""
    QUANTIZERS.add(name, QuantizerKind(make, about, frozenset(reads.split())))


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


add("lsq", LSQ, "Learned step sizes (Esser et al., 2020): the paper's main quantizer.", "step_mode init range rounding")
add("ste", STE, "Plain straight-through rounding to a min-max grid that follows the weight.", "range rounding")
add("dorefa", DoReFa, "tanh(w) on a grid without a zero (Zhou et al., 2016).")
add("inq", INQ, "Powers of two, frozen share by share (Zhou et al., 2017).", "stages")
add("noise-accumulated", AccumulatedNoise, "Control: U(-a, a) added to the weights at every step.", "amplitude")
add("noise-fresh", FreshNoise, "Control: U(-a, a) on clean weights in training.", "amplitude")
add("noise-matched", MatchedNoise, "Control: U(-s/2, s/2) in training, s as LSQ starts.", "init")
add(
    "noise-then-round",
    NoiseThenRound,
    "Control: noise as noise-matched in training, rounded afterwards.",
    "init range",
)
add("freeze", Freeze, "Control: the layers stop training and stay in float.")
add("released", Released, "Control: rounded once and frozen, as the paper's released code does.")
add("rtn", Fixed, "After training: rounded to nearest, the control for gptq and obc.", "init range")
add(
    "gptq",
    partial(Fixed, needs_images=True),
    "After training: column by column (Frantar et al., ICLR 2023).",
    "init range calibration_images damping",
)
add(
    "obc",
    partial(Fixed, needs_images=True),
    "After training: weight by weight (Frantar et al., NeurIPS 2022): the paper's comparison.",
    "init range calibration_images damping",
)
