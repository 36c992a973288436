"""What a model file says of itself is checked like any input."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from qtdog.training.load import Preprocessing


@pytest.mark.parametrize("wrong", [0.0, -0.2, float("nan"), float("inf")])
def test_a_standard_deviation_that_cannot_be_divided_by_is_refused(wrong):
    with pytest.raises(ValidationError, match=r"std\.1"):
        Preprocessing(image_size=8, channels=3, mean=(0.5, 0.5, 0.5), std=(0.5, wrong, 0.5))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_mean_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValidationError, match=r"mean\.0"):
        Preprocessing(image_size=8, channels=1, mean=(wrong,), std=(0.5,))
