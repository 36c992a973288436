"""What can be chosen about a quantizer besides its grid, and which member reads which choice."""

from __future__ import annotations

from dataclasses import dataclass, fields

from qtdog.core.errors import ConfigError, unknown

CHOICES = {
    "step_mode": ("log", "raw", "frozen"),
    "init": ("lsq", "lsq_plus", "minmax", "mse"),
    "range": ("asymmetric", "symmetric"),
    "rounding": ("nearest", "stochastic"),
}


@dataclass(frozen=True)
class QuantizerOptions:
    """The options of all quantizers; a member says in the registry which of them it reads.

    Attributes:
        step_mode: how the step size is learned: `log` (any optimizer), `raw` (LSQ's own, for SGD), or `frozen`.
        init: where step sizes start: `lsq`, `lsq_plus`, `minmax` or `mse`.
        range: codes -2^(b-1) … 2^(b-1) - 1 (`asymmetric`, the paper's), or without the lowest one (`symmetric`).
        rounding: in training, `nearest` or `stochastic`; evaluation and files always round to nearest.
        amplitude: a of the noise U(-a, a).
        stages: share of the weights that is frozen after each stage of INQ, rising to 1.
        calibration_images: how many training images a method after training learns from.
        damping: added to its Hessians, as a share of their mean diagonal.

    Raises:
        ConfigError: an unknown choice, with the nearest match, or a value out of range.
    """

    step_mode: str = "log"
    init: str = "lsq"
    range: str = "asymmetric"
    rounding: str = "nearest"
    amplitude: float = 5e-5
    stages: tuple[float, ...] = (0.5, 0.75, 0.875, 1.0)
    calibration_images: int = 1000
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Check the values."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(unknown(name.replace("_", " "), getattr(self, name), known))
        rising = all(a < b for a, b in zip(self.stages, self.stages[1:], strict=False))
        if not (self.stages and rising and self.stages[0] > 0 and self.stages[-1] == 1):
            raise ConfigError(f"stages must rise from above 0 to 1, like 0.5, 0.75, 1; not {list(self.stages)}")
        for name in ("amplitude", "calibration_images", "damping"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")

    @property
    def changed(self) -> list[str]:
        """Names of the options that are not at their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


OPTION_NAMES = tuple(field.name for field in fields(QuantizerOptions))
