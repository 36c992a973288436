from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from qtdog.data.dataset import DomainSubset
from qtdog.data.known_datasets import RotatedDigits
from qtdog.ensemble.model import Member, load
from qtdog.ensemble.scoring import score_domains
from qtdog.training.evaluation import class_scores

NAMES = [f"c{number}" for number in range(5)]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_classes_add_up_to_the_confusion_matrix(pairs: list[tuple[int, int]]):
    labels, answers = (torch.tensor(column) for column in zip(*pairs, strict=True))
    table = confusion_matrix(labels, answers, labels=range(5))
    rows = {row["class"]: row for row in class_scores(answers, labels, NAMES)}
    assert set(rows) == {NAMES[label] for label in set(labels.tolist())}
    for name, row in rows.items():
        own = table[NAMES.index(name)]
        assert (row["n"], row["right"]) == (own.sum(), own[NAMES.index(name)])
        assert row["called"] == {NAMES[i]: own[i] for i in range(5) if own[i] and NAMES[i] != name}
        assert list(row["called"].values()) == sorted(row["called"].values(), reverse=True)


def test_scores_of_a_domain_have_its_classes_and_an_interval(quantized: list[Member], digits: RotatedDigits):
    model = load(quantized[0].path / "model.safetensors")
    (score,) = score_domains(model, DomainSubset(digits, ["75"])).values()
    assert sum(one["n"] for one in score["classes"]) == score["n"]
    assert sum(one["right"] for one in score["classes"]) == pytest.approx(score["accuracy"] * score["n"])
    assert score["interval"][0] < score["accuracy"] < score["interval"][1]
