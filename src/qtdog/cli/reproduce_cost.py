"""What the missing runs of a table cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qtdog.cli.reproduce_plan import Job
from qtdog.core.config import Config
from qtdog.data.cards import CARDS
from qtdog.models.flops import training_flops
from qtdog.models.text import TEXT_BACKBONES


@dataclass(frozen=True)
class Cost:
    """What runs cost to train; evaluations, and objectives that pass more than once over a batch, come on top.

    Attributes:
        n_runs: runs.
        n_images: images (or texts) that are trained on, with repetition.
        flops: floating-point operations.
    """

    n_runs: int
    n_images: int
    flops: float

    def hours(self, tflops: float) -> float:
        """Return the hours on a device that sustains `tflops` · 10¹² operations per second.

        Example:
            >>> Cost(1, 1, 3.6e16).hours(10)
            1.0
        """
        return self.flops / (tflops * 1e12) / 3600


def cost_of(jobs: Iterable[Job]) -> Cost:
    """Return what the runs cost that are not finished; a run that several rows share counts once.

    Raises:
        ModelError: as in `models.flops.training_flops`.
    """
    missing = {job.folder.path: job for job in jobs if job.result is None}
    each: dict[tuple[str, int, int], float] = {}
    n_images, flops = 0, 0.0
    for job in missing.values():
        what = _network_of(job.config)
        if what not in each:
            each[what] = training_flops(what[0], channels=what[1], size=what[2])
        seen = job.config.train.steps * job.config.data.batch_size * job.n_sources
        n_images += seen
        flops += seen * each[what]
    return Cost(len(missing), n_images, flops)


def _network_of(config: Config) -> tuple[str, int, int]:
    sheet = CARDS[config.data.source] if config.data.source in list(CARDS) else None
    is_text = config.model.backbone in TEXT_BACKBONES
    size = config.data.max_tokens if is_text else config.data.image_size
    return config.model.backbone, 3 if sheet is None else sheet.channels, size
