"""An old and a new model on the same images, site by site: what was won, what was lost, and whether that is chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator

from qtdog.core.errors import ConfigError
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.ensemble.prediction import AnyModel, collect_logits
from qtdog.ensemble.scoring import open_for
from qtdog.training.evaluation import EvaluationInputs

LEVEL = 0.05  # of the test that calls a site worse


@dataclass(frozen=True)
class SiteComparison:
    """Two models on the images of one domain (a site, a camera, a hospital).

    Attributes:
        domain: its name.
        n: images.
        n_old: answered right by the old model.
        n_new: by the new one.
        n_won: wrong before and right now.
        n_lost: right before and wrong now.
    """

    domain: str
    n: int
    n_old: int
    n_new: int
    n_won: int
    n_lost: int

    @property
    def difference(self) -> float:
        """Accuracy of the new model minus that of the old one, as a fraction."""
        return (self.n_won - self.n_lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference.

        Source: Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
        Medicine 2005: half an image is added to each of the four cells, then the normal interval of paired shares.

        Example:
            >>> low, high = SiteComparison("c", n=100, n_old=80, n_new=86, n_won=8, n_lost=2).interval
            >>> round(low, 3), round(high, 3)
            (-0.004, 0.122)
        """
        n, won, lost = self.n + 2, self.n_won + 0.5, self.n_lost + 0.5
        middle = (won - lost) / n
        half = 1.96 * math.sqrt((won + lost) - (won - lost) ** 2 / n) / n
        return max(-1.0, middle - half), min(1.0, middle + half)

    @property
    def p_value(self) -> float:
        """Two-sided p of the exact McNemar test: are images lost as often as won? 1 if no answer changed.

        Source: McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.

        Example:
            >>> SiteComparison("c", n=100, n_old=80, n_new=86, n_won=8, n_lost=2).p_value
            0.109375
        """
        changed, fewer = self.n_won + self.n_lost, min(self.n_won, self.n_lost)
        tail = math.fsum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed
        return min(1.0, 2 * tail)

    @property
    def verdict(self) -> str:
        """`worse` or `better` where chance alone does not explain it (p < 0.05), else `no difference shown`."""
        if self.p_value >= LEVEL:
            return "no difference shown"
        return "worse" if self.n_lost > self.n_won else "better"


def compare_sites(
    old: AnyModel, new: AnyModel, dataset: DomainDataset, *, progress: Progress = None
) -> list[SiteComparison]:
    """Return how two models do on every domain of a data set; all images are scored, classes are matched by name.

    The models may differ in everything: backbone, image size, number of members, and in classes that the data set
    does not have.

    Args:
        old: one model or an ensemble.
        new: the one that may replace it.
        dataset: images of old and new sites.
        progress: of decoding images.

    Raises:
        ConfigError: one takes texts and the data set is of images, or the other way round; no image at all.
        DataError: the data set has a class that one of them does not know, other channels, or an unreadable image.
    """
    right = [_right(model, dataset, progress) for model in (old, new)]
    sites = []
    for domain in dataset.domains:
        indices = dataset.indices(domain)
        if not len(indices):
            raise ConfigError(f"domain '{domain}' has no image")
        before, after = (answers[indices] for answers in right)
        counts = (before.sum(), after.sum(), (~before & after).sum(), (before & ~after).sum())
        sites.append(SiteComparison(domain, len(indices), *map(int, counts)))
    return sites


def _right(model: AnyModel, dataset: DomainDataset, progress: Progress) -> npt.NDArray[np.bool_]:
    """Return whether the model answers each image of the data set right."""
    cache, labels = open_for(model, dataset, progress)
    device = Accelerator().device
    how = model.info.preprocessing
    batches = EvaluationInputs(cache, labels, how.mean, how.std).batches(np.arange(len(dataset)))
    images = collect_logits(model.to(device), batches, device)
    return (images.logits.mean(0).argmax(1) == images.labels).numpy()


def worse_sites(sites: Sequence[SiteComparison]) -> list[str]:
    """Return the domains at which the new model is worse than the old one, beyond chance."""
    return [site.domain for site in sites if site.verdict == "worse"]
