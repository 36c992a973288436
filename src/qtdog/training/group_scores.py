"""Accuracy over groups (reviewers), in and out of distribution: the measure of a data set of many small domains."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parametrize

from qtdog.data.group_accuracy import group_accuracy
from qtdog.data.loader import eval_batches
from qtdog.data.text import TextDomains
from qtdog.training.evaluator import EVAL_BATCH
from qtdog.training.parts import Parts
from qtdog.training.problem import Problem


def group_scores(parts: Parts, problem: Problem, dataset: object) -> dict[str, Any]:
    """Return `{"groups": {"in": …, "out": …}}`, each a `data.group_accuracy.GroupAccuracy`; {} without groups.

    "in" are texts of the sources that were neither trained nor selected on (the official id_test), "out" all of the
    unseen domain. Source: Koh et al., *WILDS* (ICML 2021), Amazon.

    Args:
        parts: with the network that ships.
        problem: roles of domains and texts.
        dataset: the data set.
    """
    if not isinstance(dataset, TextDomains):
        return {}
    sets = {"in": np.concatenate([problem.splits[domain].test for domain in problem.sources])}
    if problem.target is not None:
        sets["out"] = problem.splits[problem.target].everything
    scores = {
        name: asdict(group_accuracy(_correct(parts, indices), dataset.group_index[indices]))
        for name, indices in sets.items()
        if len(indices)
    }
    return {"groups": scores}


@torch.no_grad()
def _correct(parts: Parts, indices: np.ndarray) -> np.ndarray:
    """Return whether each text is answered right, bool (n,), in evaluation mode."""
    how = parts.batches
    batches = eval_batches(how.cache, indices, how.class_index, batch_size=EVAL_BATCH, mean=how.mean, std=how.std)
    right = []
    with parametrize.cached():
        for tokens, labels in batches:
            logits = parts.network(tokens.to(parts.accelerator.device))
            right.append((logits.argmax(1).cpu() == labels).numpy())
    return np.concatenate(right)
