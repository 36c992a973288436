"""The axes crossed: every pair of members meets in a run that trains, resumes bit for bit, and ships what it measured.

The cells, and what is checked in each, are those of `tests/stress/contract.py`, which runs the whole cross product.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator

import pytest
import timm

from support import load_script

contract = load_script("tests/stress/contract.py")
CELLS = contract.pairwise_cells(contract.AXES)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Hundreds of runs: leave out what makes one safe from a power cut, and what timm does anew each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(timm, "list_models", functools.cache(timm.list_models))
        yield


@pytest.fixture(scope="module")
def opened():
    """The data set, and the name of its content."""
    return contract.open_digits()


@pytest.mark.parametrize("cell", CELLS, ids=contract.name_of)
def test_a_combination_trains_resumes_and_ships(cell, opened, tmp_path):
    contract.check_cell(cell, *opened, tmp_path / "run")


def test_every_member_of_every_axis_is_among_them():
    for axis, members in contract.AXES.items():
        assert {cell[axis] for cell in CELLS} == set(members)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (14, 16, 3, 4), (5, 1, 3), (3, 3, 3, 3, 3)])
def test_few_cells_let_all_pairs_meet(sizes):
    axes = {f"axis{place}": [f"{place}.{member}" for member in range(size)] for place, size in enumerate(sizes)}
    cells = contract.pairwise_cells(axes)
    met = set().union(*(contract.pairs_of(cell) for cell in cells))
    for one, other in itertools.combinations(axes, 2):
        for a, b in itertools.product(axes[one], axes[other]):
            assert frozenset({(one, a), (other, b)}) in met
    largest = sorted(sizes)[-2:]
    assert len(cells) <= 2 * largest[0] * largest[1]
    assert cells == contract.pairwise_cells(axes)


def test_a_difference_after_resuming_is_noticed(opened, tmp_path):
    cell = dict.fromkeys(contract.AXES, "none") | {"objective": "erm", "step_rule": "plain"}
    ends = itertools.count()
    with pytest.raises(AssertionError, match="ends in another state"):
        contract.check_cell(cell, *opened, tmp_path / "run", end_of=lambda folder: next(ends))


def test_what_passed_is_not_run_again_by_the_same_version(tmp_path):
    made: list[str] = []

    def check(cell, dataset, content, path):
        made.append(contract.name_of(cell))
        if cell["averager"] == "sma":
            raise ValueError("broken")

    cells = [{"quantizer": "none", "objective": "erm", "step_rule": "plain", "averager": a} for a in ("none", "sma")]
    assert contract.run_cells(cells, tmp_path / "log", check=check) == {"none+erm+plain+sma": "ValueError: broken"}
    contract.run_cells(cells, tmp_path / "log", check=check)
    assert made == ["none+erm+plain+none", "none+erm+plain+sma", "none+erm+plain+sma"]
    contract.run_cells(cells, tmp_path / "log", check=check, now="another")
    assert len(made) == 5
