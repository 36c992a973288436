from pathlib import Path

import pytest

from qtdog.analysis.bit_plan import BitPlan, parse_candidates, place, without_target
from qtdog.core.config_io import build_config
from qtdog.core.errors import ConfigError
from qtdog.data.dataset import DomainSubset


def plan(digits, *, candidates=(7, 4), changes=(), **more) -> BitPlan:
    config = build_config([{"train": {"steps": 100}, "data": {"target": "none"}}, *changes])
    return BitPlan(config, without_target(digits, "75"), candidates, **more)


def test_cost_is_sources_times_start_plus_candidates_times_brief_steps(digits):
    assert plan(digits).n_steps == 5 * (40 + 2 * 15)
    assert plan(digits, brief_steps=7).n_steps == 5 * (40 + 2 * 7)
    assert plan(digits, changes=[{"train": {"steps": 2}, "quantizer": {"start_step": 1}}]).steps_each == 1


def test_trial_is_the_beginning_of_the_run_at_a_constant_rate(digits):
    late = {"optimizer": {"schedule": "cosine", "decay_from": 10}, "data": {"test_mode": "in-domain"}}
    config = plan(digits, changes=[late]).trial_config("30", 4)
    assert (config.data.target, config.data.test_mode, config.quantizer.bits) == ("30", "target", 4)
    assert (config.start_step, config.train.steps, config.optimizer.schedule) == (40, 55, "constant")
    assert config.decay_from == 40


def test_key_names_all_but_the_candidates_and_how_they_are_measured(digits):
    key = plan(digits).key
    assert plan(digits, candidates=(8,), n_directions=3, gamma=2.0).key == key
    assert plan(digits, changes=[{"quantizer": {"bits": 3}}]).key == key
    assert plan(digits, brief_steps=3).key != key
    assert plan(digits, changes=[{"optimizer": {"lr": 0.1}}]).key != key
    assert plan(digits, changes=[{"quantizer": {"init": "mse"}}]).key != key


@pytest.mark.parametrize(("text", "expected"), [("7", (7,)), ("4,8", (8, 4)), (" 5, 5,6 ", (6, 5))])
def test_candidates(text, expected):
    assert parse_candidates(text) == expected


@pytest.mark.parametrize("text", ["", "seven", "7,", "1,7", "9", "7;6"])
def test_wrong_candidates(text):
    with pytest.raises(ConfigError, match="--candidates"):
        parse_candidates(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": {"name": "none"}}, "leaves the weights in float"),
        ({"quantizer": {"name": "noise-fresh"}}, "leaves the weights in float"),
        ({"quantizer": {"name": "gptq"}}, "works after training"),
        ({"quantizer": {"start_step": 0}}, "must be at least 1"),
        ({"train": {"selection": "oracle"}, "data": {"target": "75"}}, "looks at the unseen domain"),
    ],
)
def test_what_could_not_be_tried_is_refused(changes, message, digits):
    with pytest.raises(ConfigError, match=message):
        plan(digits, changes=[changes])


@pytest.mark.parametrize("more", [{"brief_steps": 0}, {"n_directions": 1}, {"gamma": 0.0}])
def test_numbers_out_of_range_are_refused(more, digits):
    with pytest.raises(ConfigError, match="must be at least"):
        plan(digits, **more)


def test_sources_are_what_is_left_without_the_target(digits):
    assert without_target(digits, "none").domains == digits.domains
    with pytest.raises(ConfigError, match="unknown target domain '57'; did you mean '75'"):
        without_target(digits, "57")
    with pytest.raises(ConfigError, match="two source domains or more, found 0"):
        without_target(DomainSubset(digits, ["0", "75"]), "75")
    with pytest.raises(ConfigError, match="found none"):
        without_target(DomainSubset(digits, ["75"]), "75")


def test_folders_of_domains_with_a_slash_lie_below_out():
    assert place(Path("out"), "a/b", "float").parts[0::2] == ("out", "float")
    assert len({place(Path("out"), name, "float") for name in ("a/b", "a_b", "a:b")}) == 3
