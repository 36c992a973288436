"""One evaluation of a run: every source's held-out part, and the test images that selection never sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator

from qtdog.core.errors import ConfigError
from qtdog.data.decoded_cache import DecodedCache
from qtdog.data.loader import eval_batches
from qtdog.models.network import Network
from qtdog.runs.record import Record, Score, SourceRecord, merge_scores
from qtdog.training.evaluate import evaluate
from qtdog.training.problem import Problem

EVAL_BATCH = 128


@dataclass(frozen=True)
class Evaluator:
    """Measures a network on the images of a problem.

    Attributes:
        network: evaluated in place.
        accelerator: device and processes.
        cache, class_index: images and labels of the data set.
        problem: the roles of the images.
        test_mode: `target` or `in-domain`.
        mean, std: of the input, per channel.
    """

    network: Network
    accelerator: Accelerator
    cache: DecodedCache
    class_index: np.ndarray
    problem: Problem
    test_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, step: int, selectable: bool, train_loss: float | None, check: Callable[[], None]) -> Record:
        """Return the record of this moment."""
        source = {domain: self.score(part, check) for domain, part in self.problem.selection_sets().items()}
        test, test_in = self._test_scores(check)
        return Record(SourceRecord(step, selectable, source), test, test_in, train_loss)

    def _test_scores(self, check: Callable[[], None]) -> tuple[dict[str, Score], dict[str, Score]]:
        splits, target = self.problem.splits, self.problem.target
        if self.test_mode == "in-domain":
            return {domain: self.score(splits[domain].test, check) for domain in self.problem.sources}, {}
        if target is None:
            return {}, {}
        parts = [self.score(part, check) for part in (splits[target].train, splits[target].heldout)]
        return {target: merge_scores(parts)}, {target: parts[0]}

    def score(self, indices: np.ndarray, check: Callable[[], None] = lambda: None) -> Score:
        """Return accuracy and loss over the images at `indices`, shared among the processes."""
        accelerator = self.accelerator
        if len(indices) < accelerator.num_processes:
            raise ConfigError(f"{len(indices)} images cannot be shared among {accelerator.num_processes} processes")
        mine = indices[accelerator.process_index :: accelerator.num_processes]
        batches = eval_batches(self.cache, mine, self.class_index, batch_size=EVAL_BATCH, mean=self.mean, std=self.std)
        # A signal reaches the processes at different batches; among several, only the loop asks, between two steps.
        alone = accelerator.num_processes == 1
        return evaluate(self.network, batches, accelerator, check=check if alone else lambda: None)
