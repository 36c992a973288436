from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from qtdog.core.errors import DataError
from qtdog.data.dataset import DomainSubset
from qtdog.data.known_datasets import RotatedDigits
from qtdog.data.open import open_dataset
from qtdog.ensemble.model import Member, load
from qtdog.ensemble.scoring import SiteComparison, compare_sites, score_domains, worse_sites


def site(won: int, lost: int, both: int = 10, neither: int = 5) -> SiteComparison:
    return SiteComparison("c", won + lost + both + neither, both + lost, both + won, won, lost)


@given(won=st.integers(0, 60), lost=st.integers(0, 60))
def test_the_test_is_the_exact_binomial_one(won: int, lost: int):
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert site(won, lost).p_value == pytest.approx(expected, abs=1e-12)


@given(won=st.integers(0, 60), lost=st.integers(0, 60), both=st.integers(0, 60), neither=st.integers(1, 60))
def test_the_interval_holds_the_difference(won: int, lost: int, both: int, neither: int):
    one = site(won, lost, both, neither)
    low, high = one.interval
    assert -1 <= low <= one.difference * one.n / (one.n + 2) <= high <= 1
    assert one.n_new - one.n_old == won - lost
    mirrored = site(lost, won, both, neither)
    assert mirrored.interval == pytest.approx((-high, -low))


def test_a_site_is_worse_only_beyond_chance():
    assert [site(won, lost).verdict for won, lost in ((0, 5), (0, 6), (6, 0), (20, 21))] == [
        "no difference shown",  # p = 0.0625
        "worse",  # p = 0.03125
        "better",
        "no difference shown",
    ]
    assert worse_sites([site(0, 6), site(6, 0)]) == ["c"]


def test_counts_agree_with_the_scores_of_each_model(quantized: list[Member], digits: RotatedDigits):
    some = DomainSubset(digits, ["0", "75"])
    old, new = (load(member.path / "model.safetensors") for member in quantized[:2])
    before, after = score_domains(old, some), score_domains(new, some)
    for one in compare_sites(old, new, some):
        assert one.n == before[one.domain]["n"]
        assert one.n_old / one.n == pytest.approx(before[one.domain]["accuracy"])
        assert one.n_new / one.n == pytest.approx(after[one.domain]["accuracy"])
        assert one.n_new - one.n_old == one.n_won - one.n_lost
    assert [one.n_won + one.n_lost for one in compare_sites(old, old, some)] == [0, 0]


def test_a_model_that_answers_at_random_is_told_apart(quantized: list[Member], digits: RotatedDigits):
    good = load(quantized[0].path / "model.safetensors")
    bad: Any = load(quantized[0].path / "model.safetensors")
    with torch.no_grad():  # always the first class
        bad.network.classifier.weight.zero_()
        bad.network.classifier.bias.zero_()
    (one,) = compare_sites(bad, good, DomainSubset(digits, ["75"]))
    zeros = int((digits.class_index[digits.indices("75")] == 0).sum())
    assert one.n_old == zeros
    assert one.n == len(digits.indices("75"))


def test_images_of_another_kind_are_refused(quantized: list[Member], image_tree: Path):
    model = load(quantized[0].path / "model.safetensors")
    with pytest.raises(DataError, match="1 channels"):
        compare_sites(model, model, open_dataset(str(image_tree)))
