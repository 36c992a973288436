"""Confusion and its summaries against counts made by hand and by scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from qtdog.analysis.errors_by_domain import ScoredImage, confusion, domain_errors, surest_mistakes


def test_the_confusion_is_that_of_scikit_learn():
    rng = np.random.Generator(np.random.Philox(0))
    pairs = rng.integers(4, size=(100, 2)).tolist()
    answers = [ScoredImage("a", str(i), label, said, 0.5) for i, (label, said) in enumerate(pairs)]
    expected = confusion_matrix([p[0] for p in pairs], [p[1] for p in pairs], labels=range(4))
    assert (confusion(answers, 4) == expected).all()


def test_the_worst_parts_are_found_each_domain_counting_once():
    tables = {
        "a": np.array([[9, 1], [0, 10]]),
        "b": np.array([[1, 0], [1, 1]]),
        "t": np.array([[3, 1], [4, 0]]),
    }
    found = domain_errors(tables, ["a", "b"], "t")
    assert found.accuracy == pytest.approx({"a": 0.95, "b": 2 / 3, "t": 3 / 8})
    assert found.source_accuracy == pytest.approx((0.95 + 2 / 3) / 2)
    assert found.gap == pytest.approx(found.source_accuracy - 3 / 8)
    assert (found.worst_domain, found.worst_class) == ("t", 1)
    assert found.worst_class_accuracy == pytest.approx((1 + 0.5 + 0) / 3)
    assert found.worst_cell == ("t", 1, 0.0, 4)


def test_a_class_that_a_domain_lacks_does_not_count_there():
    tables = {"a": np.array([[2, 0], [0, 0]]), "b": np.array([[0, 1], [0, 1]])}
    found = domain_errors(tables, ["a", "b"], None)
    assert (found.worst_class, found.worst_class_accuracy) == (0, 0.5)
    assert found.target_accuracy is None
    assert found.gap is None


def test_mistakes_come_surest_first():
    answers = [ScoredImage("a", "x", 0, 1, 0.7), ScoredImage("a", "w", 0, 1, 0.7), ScoredImage("a", "y", 1, 1, 0.99)]
    assert [answer.key for answer in surest_mistakes(answers, 2)] == ["w", "x"]
    assert surest_mistakes(answers, 0) == []
