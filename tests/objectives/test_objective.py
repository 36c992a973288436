"""What every objective has in common: its hyper-parameters, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from qtdog.core.errors import ConfigError
from qtdog.objectives.base import FAMILIES, OBJECTIVES, Objective

COMPARING = ("irm", "groupdro", "vrex", "coral", "deep-coral", "mmd", "mixup", "fishr", "mldg", "fish")
# DomainBed's defaults and the ends of its random search
DOMAINBED = {
    ("irm", "weight"): (1e2, 1e-1, 1e5),
    ("irm", "anneal_steps"): (500, 1, 1e4),
    ("groupdro", "eta"): (1e-2, 1e-3, 1e-1),
    ("vrex", "weight"): (1e1, 1e-1, 1e5),
    ("vrex", "anneal_steps"): (500, 1, 1e4),
    ("coral", "weight"): (1.0, 1e-1, 1e1),
    ("mmd", "weight"): (1.0, 1e-1, 1e1),
    ("mixup", "alpha"): (0.2, 1e-1, 1e1),
    ("fishr", "weight"): (1000.0, 1e1, 1e4),
    ("fishr", "anneal_steps"): (1500, 0, 5000),
    ("fishr", "ema"): (0.95, 0.9, 0.99),
    ("rsc", "feature_frac"): (1 / 3, 0, 0.5),
    ("rsc", "image_frac"): (1 / 3, 0, 0.5),
    ("mldg", "beta"): (1.0, 1e-1, 1e1),
    ("fish", "meta_lr"): (0.5, 0.05, 0.5),
}


@pytest.mark.parametrize(("where", "numbers"), DOMAINBED.items(), ids=[".".join(where) for where in DOMAINBED])
def test_defaults_and_search_ranges_are_domainbeds(where, numbers):
    name, parameter = where
    how = OBJECTIVES[name].HYPERPARAMETERS[parameter]
    assert (how.default, *(how.search or ())) == pytest.approx(numbers)
    rng = np.random.default_rng(0)
    drawn = [how.draw(rng) for _ in range(200)]
    assert all(type(value) is type(how.default) for value in drawn)
    assert numbers[1] <= min(drawn) < max(drawn) <= numbers[2]  # pyright: ignore[reportOperatorIssue]


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_each_member_says_what_it_is_and_starts_with_what_it_may_draw(setting, name):
    member = OBJECTIVES[name]
    assert member.__doc__
    assert member.__doc__ != Objective.__doc__
    for parameter, how in member.HYPERPARAMETERS.items():
        assert how.about
        assert how.low <= float(how.default) <= how.high if not how.choices else how.default in how.choices, parameter
        if how.search is not None:
            assert how.low <= how.search[0] < how.search[1] <= how.high, parameter


@pytest.mark.parametrize("name", COMPARING)
def test_one_source_domain_is_refused(setting, name):
    with pytest.raises(ConfigError, match=rf"objective '{name}' compares domains .* at least 2 .* found 1\. .*erm"):
        OBJECTIVES[name](setting(n_domains=1), {})


@pytest.mark.parametrize("name", ["irm", "coral", "deep-coral", "fishr"])
def test_a_batch_of_one_image_is_refused(setting, name):
    with pytest.raises(ConfigError, match=rf"objective '{name}' needs at least 2 images .*--batch-size 2"):
        OBJECTIVES[name](setting(batch_size=1), {})


def test_what_counts_is_the_batch_of_all_processes(setting):
    OBJECTIVES["coral"](setting(batch_size=2, n_processes=2), {})


@pytest.mark.parametrize("name", ["miro", "sagnet", "mldg", "fish"])
def test_several_processes_are_refused(setting, name):
    with pytest.raises(ConfigError, match=rf"objective '{name}' works in one process only, and there are 2"):
        OBJECTIVES[name](setting(n_processes=2), {})


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("irm", {"wieght": 1.0}, "objective 'irm' has no hyper-parameter 'wieght'; did you mean 'weight'"),
        ("vrex", {"anneal": 3}, "did you mean 'anneal_steps'"),
        ("fish", {"metalr": 0.1}, "did you mean 'meta_lr'"),
        ("erm", {"weight": 1.0}, "objective 'erm' has no hyper-parameter 'weight'. It has: none"),
        ("coral", {"weight": "much"}, "weight of objective 'coral' must be float, not 'much'"),
        ("irm", {"anneal_steps": 2.5}, "anneal_steps of objective 'irm' must be int, not 2.5"),
        ("mixup", {"alpha": 0.0}, "alpha of objective 'mixup' must lie in 0.001 … inf, not 0"),
        ("fishr", {"ema": 1.0}, "ema of objective 'fishr' must lie in 0 … 0.999, not 1"),
        ("rsc", {"feature_frac": -0.1}, "feature_frac of objective 'rsc' must lie in 0 … 1, not -0.1"),
    ],
)
def test_unknown_and_impossible_hyper_parameters_are_refused(setting, name, params, message):
    with pytest.raises(ConfigError) as caught:
        OBJECTIVES[name](setting(), params)
    assert message in str(caught.value)


def test_a_loss_of_more_than_outputs_says_so(outputs, objective):
    with pytest.raises(NotImplementedError, match="call it as a module"):
        objective("mixup").loss(outputs())


def test_every_objective_of_a_family_is_in_its_file():
    files = {name: OBJECTIVES[name].__module__.rpartition(".")[2] for names in FAMILIES.values() for name in names}
    assert files == {name: file for file, names in FAMILIES.items() for name in names}
