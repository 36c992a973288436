from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qtdog.core.errors import ConfigError
from qtdog.report.compare import compare, compare_values, comparison_sheet
from qtdog.report.plots import plot_differences
from qtdog.runs.find import find

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


def test_interval_and_test_are_scipys():
    rng = np.random.default_rng(3)
    first = rng.uniform(0.5, 0.7, 15)
    second = first + rng.normal(0.01, 0.02, 15)
    found = compare_values(list(first), list(second))
    assert found.p_value == pytest.approx(stats.wilcoxon(second - first)[1])
    spread = (second - first).std(ddof=1) / np.sqrt(15)
    assert found.low is not None
    assert found.low == pytest.approx(found.mean - 1.96 * spread, abs=0.5 * spread)
    assert compare_values(list(first), list(second)) == found


@pytest.mark.parametrize(
    "differences", [[0.1], [0.1, -0.1], [0.1, 0.1, 0.2, -0.1, 0.3, 0.2], [0.01, 0.02, -0.03, 0.04, 0.05, 0.06, -0.07]]
)
def test_the_exact_test_is_scipys_also_with_ties(differences: list[float]):
    found = compare_values([0.0] * len(differences), differences)
    assert found.p_value == pytest.approx(stats.wilcoxon(differences)[1])


def test_it_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        second = rng.normal(0.02, 0.05, 30)
        found = compare_values([0.0] * 30, list(second))
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.02 <= found.high
    assert 50 <= hits <= 60


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
    entries = find([study]).entries
    both = compare(entries, ("erm + float", "erm + lsq 7 bit"), "source")
    few = compare(entries, ("erm + float", "erm + lsq 4 bit"), "source")
    assert both is not None
    assert few is not None
    assert (both.n, few.n) == (12, 2)
    assert {target for target, _ in few.pairs} == {"art_painting", "cartoon"}
    assert compare(entries, ("erm + float", "EoQ of 3: erm + lsq 7 bit"), "last") is None
    assert any("too few" in line for line in comparison_sheet("t", [few]).about)


def test_an_unknown_row_gets_the_nearest_name(study: Path):
    with pytest.raises(ConfigError, match="did you mean 'erm \\+ lsq 7 bit'"):
        compare(find([study]).entries, ("erm + float", "erm + lsq 7bit"), "source")


def test_several_trials_of_one_domain_are_several_pairs(make_run: Callable[..., Path], tmp_path: Path):
    for trial in range(2):
        problem = {"data": {"target": "photo", "trial": trial}}
        make_run(tmp_path / f"a{trial}", **problem)
        make_run(tmp_path / f"b{trial}", **problem, quantizer={"name": "none"})
    found = compare(find([tmp_path]).entries, ("erm + float", "erm + lsq 7 bit"), "last")
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
