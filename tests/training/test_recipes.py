"""The shipped combinations of methods, and what a result says of the weights that it kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qtdog.core.config import Config
from qtdog.core.config_io import build_config, load_preset, preset_names
from qtdog.core.errors import ConfigError
from qtdog.runs.folder import RunFolder
from qtdog.training.build import AVERAGERS, STEP_RULES, build_components
from qtdog.training.evaluation import Evaluator
from qtdog.training.load_model import load_model
from qtdog.training.protocol import make_protocol, resolve
from qtdog.training.run import RunCallbacks, no_health_check, run

TINY = {
    "data": {"target": "75", "batch_size": 4, "image_size": 8},
    "train": {"steps": 6, "eval_every": 2},
    "quantizer": {"start_step": 1},
}
RECIPES = [name for name in preset_names() if {"averager", "step_rule"} & set(load_preset(name))]


# six steps from a random start may fall to chance and mean nothing by it
CALM = RunCallbacks(make_health_check=no_health_check)


@pytest.fixture
def recipe(digits) -> Callable[..., Config]:
    def make(*names: str, **changes: dict[str, Any]) -> Config:
        return resolve(build_config([*(load_preset(name) for name in names), TINY, changes]), digits)

    return make


def test_the_recipes_are_known():
    assert set(RECIPES) == {"average-then-quantize", "ermpp", "lsq-sma", "miro-swad", "robust", "small", "swad", "tiny"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_on_the_digits(name, recipe, digits, tmp_path):
    phases = name == "average-then-quantize"
    quantizer = {"start_step": 4} if phases else {}
    config = recipe(name, "digits", averager=TINY_AVERAGERS[name], quantizer=quantizer)
    result = run(config, digits, RunFolder(tmp_path), callbacks=CALM)
    if phases:
        assert result["kept"] == "weights after update 6, quantization having begun with: average of updates 2 to 4"
    else:
        assert result["kept"].startswith("average of updates 2 to ")


TINY_AVERAGERS = {
    "average-then-quantize": {"params": {"start": 2}},
    "ermpp": {"params": {"start": 2}},
    "lsq-sma": {"params": {"start": 2}},
    "miro-swad": {"params": {"n_converge": 1, "n_tolerance": 3}},
    "robust": {"params": {"start": 2}},
    "small": {"params": {"start": 2}},
    "swad": {"params": {"n_converge": 1, "n_tolerance": 3}},
    "tiny": {"params": {"start": 2}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_members_and_hyper_parameters_that_exist(name):
    config = build_config([load_preset(name)])
    AVERAGERS[config.averager.name](config.averager.params, 0)
    STEP_RULES[config.step_rule.name](config.step_rule.params)


@pytest.mark.parametrize(
    ("averager", "kept"),
    [
        ({"name": "none"}, "weights after update {step}"),
        ({"name": "sma", "params": {"start": 1}}, "average of updates 2 to {step}"),
        ({"name": "sma"}, "weights after update {step} (chosen before update 100, from which sma averages)"),
        ({"name": "swa", "params": {"start": 2, "every": 2}}, "average of updates 2 to 6, every 2"),
        ({"name": "swa"}, "weights after update {chosen} (the run ended before update 100, from which swa averages)"),
        ({"name": "swad", "params": {"n_converge": 1, "n_tolerance": 3}}, "average of updates 2 to 6"),
        (
            {"name": "swad", "params": {"n_converge": 4, "n_tolerance": 4}},
            "weights after update {chosen} (the validation loss never converged, so swad averaged nothing)",
        ),
    ],
)
def test_the_result_says_what_was_kept(averager, kept, recipe, digits, tmp_path):
    result = run(recipe("digits", averager=averager), digits, RunFolder(tmp_path), callbacks=CALM)
    chosen = result["by_selection"]["source"]["step"]
    assert result["kept"] == kept.format(step=result["selected_step"], chosen=chosen)
    assert set(result["by_selection"]) == {"source", "last", "oracle"}
    if kept.startswith("average of updates 2 to 6"):
        assert result["selected_step"] == 6


def test_an_average_that_ships_is_measured_anew(recipe, digits, tmp_path):
    """Its accuracies are those of the file, not those of the weights that were evaluated during the run."""
    config = recipe("digits", averager={"name": "swa", "params": {"start": 1, "every": 1}})
    folder = RunFolder(tmp_path)
    result = run(config, digits, folder, callbacks=CALM)
    network = load_model(folder.model_file).network
    parts = build_components(config, digits)
    assert isinstance(parts.evaluate, Evaluator)
    scored = replace(parts.evaluate, network=network).score(digits.indices("75"))
    assert scored.accuracy == pytest.approx(result["test_accuracy"])


def test_the_second_step_of_ermpp_trains_on_every_source_image(recipe, digits, tmp_path):
    first = recipe("ermpp", "digits", averager=TINY_AVERAGERS["ermpp"])
    chosen = run(first, digits, RunFolder(tmp_path / "first"), callbacks=CALM)
    assert not chosen["trained_on_heldout"]
    data = TINY["data"] | {"train_on_heldout": True}
    train = {"steps": chosen["selected_step"], "eval_every": 2, "selection": "last"}
    second = recipe("ermpp", "digits", averager=TINY_AVERAGERS["ermpp"], data=data, train=train)
    protocol = make_protocol(second, digits)
    for domain, pool in protocol.train_pools().items():
        assert np.array_equal(np.sort(pool), digits.indices(domain))
    assert "75" not in protocol.train_pools()
    result = run(second, digits, RunFolder(tmp_path / "second"), callbacks=CALM)
    assert result["selected_step"] == chosen["selected_step"]
    assert result["trained_on_heldout"]


def test_in_the_in_domain_mode_the_third_part_is_never_trained_on(recipe, digits):
    data = TINY["data"] | {"train_on_heldout": True, "test_mode": "in-domain"}
    protocol = make_protocol(recipe("digits", data=data, train={"selection": "last"}), digits)
    for domain, pool in protocol.train_pools().items():
        assert not set(pool) & set(protocol.splits[domain].test)


def test_without_held_out_images_there_is_nothing_to_select_by(recipe):
    with pytest.raises(ConfigError, match=r"train_on_heldout leaves no images.*train\.selection=last"):
        recipe("digits", data=TINY["data"] | {"train_on_heldout": True})


def test_swad_needs_held_out_images(recipe, digits):
    data, train = TINY["data"] | {"train_on_heldout": True}, TINY["train"] | {"selection": "last"}
    config = recipe("swad", "digits", data=data, train=train)
    with pytest.raises(ConfigError, match="averager 'swad' follows the held-out images' loss"):
        build_components(config, digits)
