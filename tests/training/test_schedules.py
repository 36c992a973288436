"""Learning rates over a run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtdog.data.known_datasets import RotatedDigits
from qtdog.training.build import build_components
from qtdog.training.loop import begin_step
from qtdog.training.protocol import resolve
from qtdog.training.step_rules import lr_factor

FALLING = ("linear", "cosine")


@given(st.integers(0, 100), st.integers(1, 100), st.data())
def test_falling_schedules_hold_then_fall_to_nearly_zero(decay_from, falling, data):
    steps = decay_from + falling
    step = data.draw(st.integers(0, steps - 1))
    linear, cosine = (lr_factor(name, step, decay_from=decay_from, steps=steps) for name in FALLING)
    share = max(0, step - decay_from) / falling
    assert linear == pytest.approx(1 - share)
    assert cosine == pytest.approx(math.cos(math.pi * share / 2) ** 2)
    assert 0 < linear <= 1
    assert lr_factor("constant", step, decay_from=decay_from, steps=steps) == 1


@pytest.mark.parametrize("name", FALLING)
def test_a_schedule_never_rises(name):
    factors = [lr_factor(name, step, decay_from=3, steps=20) for step in range(20)]
    assert factors[:4] == [1, 1, 1, 1]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] < 0.06


def test_every_group_keeps_its_share_of_the_rate(short_config):
    digits = RotatedDigits()
    optimizer = {"lr": 0.01, "step_size_lr": 0.5, "schedule": "linear", "decay_from": 2}
    config = resolve(short_config(optimizer=optimizer), digits)
    parts = build_components(config, digits)
    rates = []
    for step in range(config.train.steps):
        begin_step(parts, step)
        rates.append([group["lr"] for group in parts.optimizer.param_groups])
    for step, rate in enumerate(rates):
        expected = 0.01 * (1 - max(0, step - 2) / 4)
        assert rate == pytest.approx([expected, expected / 2])
