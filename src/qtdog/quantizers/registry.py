"""The quantizers by name, as the configuration spells them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qtdog.core.quantized import QuantSpec
from qtdog.core.registry import Registry
from qtdog.quantizers.base import Quantizer
from qtdog.quantizers.lsq import LSQ

QuantizerFactory = Callable[[Tensor, QuantSpec, str], Quantizer]
"""(weight, spec, step_mode) to a quantizer for that weight, on its device, not yet enabled."""

QUANTIZERS: Registry[QuantizerFactory] = Registry("quantizer")
QUANTIZERS.add("lsq", LSQ)
