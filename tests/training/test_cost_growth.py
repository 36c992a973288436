"""`benchmarks/cost_growth.py`: what it makes up and fits."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cost_growth.py"


@pytest.fixture(scope="module")
def growth() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_exponent_is_the_slope_of_the_logarithms(growth: dict[str, Any]):
    assert growth["exponent"]([(3, 18.0), (10, 200.0), (300, 180_000.0)]) == pytest.approx(2)
    assert growth["exponent"]([(3, 5.0), (300, 5.0)]) == pytest.approx(0)


def test_images_are_made_up_in_equal_parts(growth: dict[str, Any]):
    dataset = growth["MadeUp"](3, 4, 2)
    assert np.array_equal(dataset.counts(), np.full((3, 4), 2))
    assert dataset.domain_index[8] == 1


@pytest.mark.parametrize("axis", ["images", "domains"])
def test_an_axis_is_measured(growth: dict[str, Any], axis: str):
    for row in growth["measure"](axis, quick=True, repeats=1).values():
        assert [size for size, _ in row["points"]] == growth["SIZES"][axis][1]
        assert all(time_s > 0 for _, time_s in row["points"])
        assert row["last"] == row["exponent"]  # of two points there is one slope
