"""SWAD's valley against the published algorithm, written down literally."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from qtdog.core.errors import ConfigError
from qtdog.training.swad import SWAD

SEGMENT = 3  # updates between two validations
# source validation losses of a run on the rotated digits: 4 images per domain, lr 0.01, 3 bits, every 20 steps
RECORDED = [2.367, 2.226, 1.99, 1.691, 1.39, 1.145, 0.934, 0.741, 0.81, 0.545]
RECORDED += [0.43, 0.34, 0.265, 0.403, 0.407, 0.341, 0.306, 0.462, 0.211, 0.231]
# a valley that ends, made up: such a run is overfitting
VALLEY = [1.9, 1.2, 0.8, 0.64, 0.59, 0.62, 0.65, 0.63, 0.7, 0.85, 0.93, 0.9, 0.98, 1.03, 1.1, 1.2]


def published(losses: list[float], n_s: int, n_e: int, r: float) -> tuple[int, int] | None:
    """Algorithm 2 of the paper (appendix B.4): the first and last i that count, from 0, or None without a start."""
    start, end, threshold = None, len(losses) - 1, None
    for i in range(len(losses)):
        last_s, last_e = losses[max(0, i - n_s + 1) : i + 1], losses[max(0, i - n_e + 1) : i + 1]
        if threshold is None:
            if len(last_s) == n_s and last_s[0] == min(last_s):
                start = i - n_s + 1
                threshold = (1 + r) * sum(last_s) / n_s
        elif threshold < min(last_e):
            end = i - n_e
            break
    return None if start is None else (start, end)


def follow(swad: SWAD, losses: list[float], first: int = 0) -> nn.Linear:
    network = nn.Linear(1, 1, bias=False)
    for place, loss in enumerate(losses[first:], first):
        for step in range(place * SEGMENT + 1, (place + 1) * SEGMENT + 1):
            network.weight.data.fill_(float(step * step))
            swad.after_step(step, network)
        swad.after_evaluation((place + 1) * SEGMENT, loss)
    return network


def expected_mean(window: tuple[int, int]) -> float:
    steps = torch.arange(window[0] * SEGMENT + 1, (window[1] + 1) * SEGMENT + 1, dtype=torch.float64)
    return steps.square().mean().item()


def check(swad: SWAD, window: tuple[int, int] | None, n_segments: int) -> None:
    final = swad.final()
    if window is None:
        assert final is None
        assert "never converged" in swad.kept(n_segments * SEGMENT)
        return
    assert final is not None
    assert swad.kept(0) == f"average of updates {window[0] * SEGMENT + 1} to {(window[1] + 1) * SEGMENT}"
    assert final["weight"].item() == pytest.approx(expected_mean(window), rel=1e-5)


losses_of_runs = st.lists(st.floats(0.01, 5) | st.sampled_from([0.5, 1.0, 1.3, 2.0]), min_size=1, max_size=24)


@given(losses_of_runs, st.integers(1, 4), st.integers(0, 4), st.sampled_from([0.0, 0.2, 0.3]))
@example(RECORDED, 3, 3, 0.3)
@example(VALLEY, 3, 3, 0.3)
@settings(max_examples=150, deadline=None)
def test_the_window_is_the_published_one(losses, n_s, more, r):
    n_e = n_s + more
    swad = SWAD({"n_converge": n_s, "n_tolerance": n_e, "tolerance": r}, 0)
    follow(swad, losses)
    check(swad, published(losses, n_s, n_e, r), len(losses))


@pytest.mark.parametrize(("losses", "window", "ended"), [(RECORDED, (12, 19), False), (VALLEY, (4, 8), True)])
def test_defaults_are_the_papers(losses, window, ended):
    swad = SWAD({}, 0)
    assert swad.params == {"start": 0, "n_converge": 3, "n_tolerance": 6, "tolerance": 0.3}
    follow(swad, losses)
    assert published(losses, 3, 6, 0.3) == window
    assert swad.ended == ended
    check(swad, window, len(losses))


def test_the_end_of_the_valley_ends_the_averaging_for_good():
    swad = SWAD({"n_converge": 1, "n_tolerance": 1}, 0)
    follow(swad, [1.0, 1.0, 9.0, 1.0, 0.1])
    check(swad, (0, 1), 5)


@pytest.mark.parametrize("stop", range(1, len(VALLEY)))
def test_stopped_anywhere_it_goes_on_bit_for_bit(stop):
    whole, first, second = SWAD({}, 0), SWAD({}, 0), SWAD({}, 0)
    follow(whole, VALLEY)
    follow(first, VALLEY[:stop])
    tensors, extra = first.state()
    second.restore({name: value.clone() for name, value in tensors.items()}, extra)
    follow(second, VALLEY, stop)
    assert second.kept(0) == whole.kept(0)
    ours, theirs = second.final(), whole.final()
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours["weight"], theirs["weight"])


def test_only_a_few_copies_of_the_network_are_held():
    swad, most_before, most_after = SWAD({}, 0), 0, 0
    for place in range(len(VALLEY)):
        follow(swad, VALLEY[: place + 1], place)
        n_copies = len(swad.state()[0])
        if swad.threshold is None:
            most_before = max(most_before, n_copies)
        else:
            most_after = max(most_after, n_copies)
    assert most_before <= 3
    assert most_after <= 2


def test_validations_before_the_start_step_do_not_count():
    swad = SWAD({"n_converge": 2, "n_tolerance": 2}, 2 * SEGMENT)
    follow(swad, [0.1, 0.2, 0.9, 0.8, 0.85])
    check(swad, (3, 4), 5)


def test_losses_that_are_no_numbers_start_no_valley():
    swad = SWAD({}, 0)
    follow(swad, [float("nan"), 1.0, float("nan"), 2.0, 3.0])
    assert swad.final() is None


def test_a_tolerance_window_shorter_than_that_of_the_start_is_refused():
    with pytest.raises(ConfigError, match=r"n_tolerance of averager 'swad' must be at least n_converge \(3\), not 2"):
        SWAD({"n_tolerance": 2}, 0)
