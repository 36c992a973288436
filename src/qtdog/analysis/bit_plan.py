"""What is tried to choose the bits, checked before anything is trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from qtdog.analysis.sensitivity import require_grid
from qtdog.core.config import AFTER_TRAINING, Config, config_hash
from qtdog.core.config_io import build_config
from qtdog.core.errors import ConfigError, unknown
from qtdog.core.quantized import MAX_BITS, MIN_BITS
from qtdog.data.dataset import DomainDataset, DomainSubset
from qtdog.data.text import SEEN, TextDomains

BRIEF_FRAC = 0.25  # of the steps after the start, if nothing else is asked for


def parse_candidates(text: str) -> tuple[int, ...]:
    """Return bit-widths from a list like `8,7,6`: most bits first, each once.

    Raises:
        ConfigError: not such a list, or bits out of range.

    Example:
        >>> parse_candidates("4, 8,6")
        (8, 6, 4)
    """
    try:
        found = {int(part) for part in text.split(",")}
    except ValueError as error:
        raise ConfigError(f"--candidates takes bits like 8,7,6,5,4; got '{text}'") from error
    wrong = sorted(bits for bits in found if not MIN_BITS <= bits <= MAX_BITS)
    if wrong:
        raise ConfigError(f"--candidates: bits must be {MIN_BITS} to {MAX_BITS}, not {wrong[0]}")
    return tuple(sorted(found, reverse=True))


@dataclass(frozen=True)
class BitPlan:
    """What is tried.

    Attributes:
        config: of the run that the bits are for, resolved on the sources alone, with no target.
        sources: the data set without the target (`without_target`).
        candidates: bit-widths.
        brief_steps: steps of each candidate after the start; None for a quarter of those of the run.
        gamma: radius of the flatness; None for a share of the length of the float weights.
        n_directions: random directions of the flatness.
    """

    config: Config
    sources: DomainDataset
    candidates: tuple[int, ...]
    brief_steps: int | None = None
    gamma: float | None = None
    n_directions: int = 20

    def __post_init__(self) -> None:
        """Refuse what could not be tried, before anything is trained.

        Raises:
            ConfigError: no float steps to share, a quantizer without a grid, selection by the
                unseen domain, or a number out of range.
        """
        if self.config.train.selection == "oracle":
            raise ConfigError("train.selection=oracle looks at the unseen domain; choose bits with source or last")
        name = self.config.quantizer.name
        if name in AFTER_TRAINING:
            raise ConfigError(f"quantizer '{name}' works after training; bits are chosen for one that trains, like lsq")
        require_grid(self.config.quantizer)
        if self.start == 0:
            raise ConfigError("candidates share the float steps before quantization: --start-step must be at least 1")
        if self.steps_each < 1 or self.n_directions < 2 or (self.gamma is not None and self.gamma <= 0):
            raise ConfigError("--brief-steps must be at least 1, --directions at least 2 and --gamma above 0")

    @property
    def start(self) -> int:
        """Float steps without each domain."""
        return self.config.start_step or 0

    @property
    def steps_each(self) -> int:
        """Quantized steps of each candidate without each domain."""
        whole = self.config.train.steps - self.start
        return max(1, round(BRIEF_FRAC * whole)) if self.brief_steps is None else self.brief_steps

    @property
    def n_steps(self) -> int:
        """All updates together: sources × (start steps + candidates × brief steps)."""
        return len(self.sources.domains) * (self.start + len(self.candidates) * self.steps_each)

    @property
    def key(self) -> str:
        """Return 12 hex digits that name the plan; candidates do not count, so that one can be added later."""
        quantizer = self.config.quantizer.model_copy(update={"bits": MAX_BITS})
        base = config_hash(self.config.model_copy(update={"quantizer": quantizer}))
        text = json.dumps([base, self.steps_each])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def trial_config(self, left_out: str, bits: int) -> Config:
        """Return the configuration of one candidate without one domain, which takes the place of the target.

        It is the beginning of the run that the bits are for, with a constant learning rate.
        """
        brief = {
            "data": {"target": left_out, "test_mode": "target"},
            "quantizer": {"bits": bits, "start_step": self.start},
            "optimizer": {"schedule": "constant", "decay_from": None},
            "train": {"steps": self.start + self.steps_each},
        }
        return build_config([self.config.model_dump(), brief])


def without_target(dataset: DomainDataset, target: str) -> DomainSubset:
    """Return the source domains alone, as if the target did not exist; 'none' makes every domain a source.

    Raises:
        ConfigError: no such target, fewer than two sources are left, or a data set of texts.

    Example:
        >>> from qtdog.data.digits import RotatedDigits
        >>> without_target(RotatedDigits(), "75").domains
        ('0', '15', '30', '45', '60')
    """
    if isinstance(dataset, TextDomains):
        text = f"choosing bits leaves out one source domain after another, and {dataset.sheet.name} has only one"
        raise ConfigError(f"{text}, '{SEEN}': compare trained runs by their held-out texts instead")
    if target != "none" and target not in dataset.domains:
        raise ConfigError(unknown("target domain", target, [*dataset.domains, "none"]))
    kept = [domain for domain in dataset.domains if domain != target]
    if len(kept) < 2:
        raise ConfigError(f"choosing bits needs two source domains or more, found {', '.join(kept) or 'none'}")
    return DomainSubset(dataset, kept)


def place(out: Path, left_out: str, run: str) -> Path:
    """Return the folder of one run below `out`.

    Example:
        >>> place(Path("runs"), "site/a", "7-bit").as_posix()
        'runs/site_a/7-bit'
    """
    return out / left_out.replace("/", "_") / run
