from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qtdog.core.errors import ConfigError
from qtdog.report.charts import plot_differences
from qtdog.report.tables import comparison_table
from qtdog.runs.aggregate import compare_methods
from qtdog.runs.find import find_runs
from qtdog.runs.statistics import (
    Condition,
    Estimate,
    average_over_targets,
    compare_values,
    pair_up,
    replicate,
    t_interval,
)

ACCURACIES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12)


@settings(max_examples=25)
@given(ACCURACIES)
def test_swapping_the_two_turns_the_sign_and_nothing_else(pairs: list[tuple[float, float]]):
    first, second = zip(*pairs, strict=True)
    there, back = compare_values(first, second), compare_values(second, first)
    assert there.mean == pytest.approx(-back.mean)
    assert there.p_value == back.p_value
    if there.low is not None and there.high is not None and back.low is not None and back.high is not None:
        assert there.low <= there.mean + 1e-12
        assert there.mean <= there.high + 1e-12


@settings(max_examples=25)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
def test_the_interval_is_scipys_t_interval(differences: list[float]):
    found = compare_values([0.0] * len(differences), differences)
    assert found.low is not None
    assert found.high is not None
    if np.ptp(differences) > 1e-9:
        expected = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_signed_rank_test_is_scipys():
    rng = np.random.default_rng(3)
    first = rng.uniform(0.5, 0.7, 15)
    second = first + rng.normal(0.01, 0.02, 15)
    found = compare_values(list(first), list(second))
    assert found.p_value == pytest.approx(stats.wilcoxon(second - first)[1])


@pytest.mark.parametrize(
    "differences", [[0.1], [0.1, -0.1], [0.1, 0.1, 0.2, -0.1, 0.3, 0.2], [0.01, 0.02, -0.03, 0.04, 0.05, 0.06, -0.07]]
)
def test_the_exact_test_is_scipys_also_with_ties(differences: list[float]):
    found = compare_values([0.0] * len(differences), differences)
    assert found.p_value == pytest.approx(stats.wilcoxon(differences)[1])


@pytest.mark.parametrize("n", [3, 6, 12])
def test_it_covers_the_truth_about_as_often_as_it_says(n: int):
    rng = np.random.default_rng(0)
    intervals = [t_interval(list(rng.normal(0.02, 0.05, n))) for _ in range(1000)]
    hits = sum(low is not None and high is not None and low <= 0.02 <= high for low, high in intervals)
    assert 0.93 <= hits / 1000 <= 0.97


def runs_of(values: dict[tuple[str, int, int], float]) -> dict[Condition, float]:
    return {Condition(target, replicate([(trial, seed)])): value for (target, trial, seed), value in values.items()}


def test_pairs_agree_in_trial_and_seed_whatever_their_order():
    first = runs_of({("a", trial, seed): 0.1 * trial + 0.01 * seed for trial in (0, 1) for seed in (0, 1)})
    second = runs_of({("a", trial, seed): 0.1 * trial + 0.01 * seed for seed in (1, 0) for trial in (1, 0)})
    pairs = pair_up(first, second)
    assert len(pairs) == 4
    assert all(pair.first == pair.second for pair in pairs)


def test_an_ensemble_is_compared_with_the_mean_of_its_members_partners():
    runs = runs_of({("a", 0, seed): 0.5 + 0.1 * seed for seed in range(4)})
    ensemble = {Condition("a", replicate([(0, 0), (0, 1), (0, 3)])): 0.9}
    (there,), (back,) = pair_up(runs, ensemble), pair_up(ensemble, runs)
    assert (there.first, there.second) == pytest.approx(((0.5 + 0.6 + 0.8) / 3, 0.9))
    assert (back.first, back.second) == pytest.approx((0.9, (0.5 + 0.6 + 0.8) / 3))
    assert pair_up(ensemble, ensemble)[0].first == 0.9
    lacking = {Condition("a", replicate([(0, 0), (0, 9)])): 0.9}
    assert pair_up(runs, lacking) == []


def test_the_average_is_domainbeds():
    whole = runs_of({("a", 0, 0): 0.5, ("a", 0, 1): 0.7, ("b", 0, 0): 0.9, ("b", 0, 1): 0.8})
    got = average_over_targets(whole, ["a", "b"])
    assert (got.mean, got.error, got.n) == pytest.approx((0.725, np.std([0.7, 0.75]) / np.sqrt(2), 2))
    # a trial that lacks a domain: the mean of the domains' means, and no ±
    part = {condition: value for condition, value in whole.items() if value != 0.8}
    assert average_over_targets(part, ["a", "b"]) == Estimate(0.75, None, 1)
    assert average_over_targets(part, ["a", "b", "c"]) == Estimate(None, None, 0)


@pytest.mark.parametrize(("n", "enough"), [(1, False), (5, False), (6, True)])
def test_too_few_pairs_are_called_so(n: int, enough: bool):
    found = compare_values([0.5] * n, [0.6 + 0.001 * i for i in range(n)])
    assert (found.warning == "") == enough
    assert found.p_value == pytest.approx(2 / 2**n)


def test_equal_accuracies_give_no_p_value():
    found = compare_values([0.1, 0.2], [0.1, 0.2])
    assert found.p_value is None
    assert found.mean == 0


@pytest.mark.parametrize(("first", "second"), [([], []), ([0.1], [0.1, 0.2])])
def test_what_is_no_pair_is_refused(first: list[float], second: list[float]):
    with pytest.raises(ValueError, match="no pairs"):
        compare_values(first, second)


def test_pairs_are_those_that_both_rows_have(study: Path):
    runs = find_runs([study]).runs
    both = compare_methods(runs, ("erm + float", "erm + lsq 7 bit"), "source")
    few = compare_methods(runs, ("erm + float", "erm + lsq 4 bit"), "source")
    assert both is not None
    assert few is not None
    assert (both.n, few.n) == (12, 2)
    assert {condition.target for condition in few.conditions} == {"art_painting", "cartoon"}
    assert compare_methods(runs, ("erm + float", "EoQ of 3: erm + lsq 7 bit"), "last") is None
    assert any("too few" in line for line in comparison_table("t", [few]).notes)


def test_an_unknown_row_gets_the_nearest_name(study: Path):
    with pytest.raises(ConfigError, match="did you mean 'erm \\+ lsq 7 bit'"):
        compare_methods(find_runs([study]).runs, ("erm + float", "erm + lsq 7bit"), "source")


def test_several_trials_of_one_domain_are_several_pairs(make_run: Callable[..., Path], tmp_path: Path):
    for trial in range(2):
        problem = {"data": {"target": "photo", "trial": trial}}
        make_run(tmp_path / f"a{trial}", **problem)
        make_run(tmp_path / f"b{trial}", **problem, quantizer={"name": "none"})
    found = compare_methods(find_runs([tmp_path]).runs, ("erm + float", "erm + lsq 7 bit"), "last")
    assert found is not None
    assert found.n == 2


def test_differences_are_drawn_with_the_pairs(tmp_path):
    one, two = compare_values([0.5, 0.6], [0.55, 0.7]), compare_values([0.5], [0.4])
    for name in ("a.png", "b.svg"):
        plot_differences({"selected": {"lsq": one, "sma": two}, "mean": {"lsq": one}}, "float", tmp_path / "new" / name)
    text = (tmp_path / "new" / "b.svg").read_text()
    assert "<svg" in text
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="xyz"):
        plot_differences({"selected": {"lsq": one}}, "float", tmp_path / "a.xyz")
