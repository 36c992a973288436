"""One network from several: which weights are averaged, how they are quantized anew, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qtdog.core.config_io import build_config
from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantSpec
from qtdog.ensemble import weight_averaging as tune_module
from qtdog.ensemble.assemble import EnsembleSpec, assemble
from qtdog.ensemble.model import check_one_start, load
from qtdog.ensemble.scoring import open_evaluation_set
from qtdog.ensemble.weight_averaging import Recipe, average_weights, shipped_weights
from qtdog.packing.packed_file import load_packed
from qtdog.quantizers.lsq import initial_scale
from qtdog.training.load_model import LoadedModel, load_model


@pytest.fixture(scope="module")
def evaluation_set(quantized, digits):
    return open_evaluation_set(quantized[0].config, digits, same_splits=True)


def test_diwa_is_the_mean_of_the_weights(quantized, evaluation_set, out):
    result = assemble(quantized, EnsembleSpec("diwa", out), evaluation_set)
    expected = average_weights([shipped_weights(member) for member in quantized])
    packed = load_packed(out)
    assert packed.quantized == {}
    assert all(torch.equal(packed.rest[name], value) for name, value in expected.items())
    assert result["inference_passes"] == 1
    assert load_model(out).info.accuracy["test"] == result["test_accuracy"]
    assert packed.metadata["joined"]["kind"] == "diwa"


def test_soup_is_quantized_anew_from_the_mean(quantized, out):
    result = assemble(quantized, EnsembleSpec("soup", out, Recipe(refit="init")))
    mean = average_weights([shipped_weights(member) for member in quantized])
    packed = load_packed(out)
    assert packed.quantized.keys() == quantized[0].packed.quantized.keys()
    for name, value in packed.quantized.items():
        assert torch.allclose(value.scale, initial_scale(mean[name], QuantSpec(7)), rtol=1e-6)
        inside = (value.codes > value.spec.qmin) & (value.codes < value.spec.qmax)
        error = (value.dequantize() - mean[name]).abs() <= 0.5001 * value.scale.reshape(-1, 1, 1, 1)
        assert error[inside].all()
    assert isinstance(load(out), LoadedModel)
    assert result["size"]["ratio"] > 3


def test_mse_refit_rounds_with_less_error(quantized, out):
    mean = average_weights([shipped_weights(member) for member in quantized])
    errors = {}
    for refit in ("init", "mse"):
        assemble(quantized, EnsembleSpec("soup", out, Recipe(refit=refit)))
        packed = load_packed(out)
        errors[refit] = sum(((v.dequantize() - mean[name]) ** 2).sum().item() for name, v in packed.quantized.items())
    assert errors["mse"] < 0.7 * errors["init"]


def test_greedy_average_is_at_least_as_good_as_its_best_member(floats, evaluation_set, out):
    result = assemble(floats, EnsembleSpec("diwa", out, Recipe(pick="greedy")), evaluation_set)
    assert result["source_accuracy"] >= max(member.result["source_accuracy"] for member in floats) - 1e-9
    assert result["recipe"]["used"][0] == int(np.argmax([member.result["source_accuracy"] for member in floats]))


def test_tuning_goes_on_from_the_soup_and_keeps_what_is_best_on_the_sources(quantized, evaluation_set, out):
    plain = assemble(quantized, EnsembleSpec("soup", out), evaluation_set)
    tuned = assemble(quantized, EnsembleSpec("soup", out, Recipe(tune_steps=4)), evaluation_set)
    again = assemble(quantized, EnsembleSpec("soup", out, Recipe(tune_steps=4)), evaluation_set)
    assert tuned["source_accuracy"] >= plain["source_accuracy"]
    assert tuned["model_sha256"] == again["model_sha256"]
    assert tuned["model_sha256"] != plain["model_sha256"]
    assert tuned["training_steps"] == plain["training_steps"] + 4


def test_tuning_changes_nothing_if_it_does_not_help(quantized, digits, out, monkeypatch):
    """The state before the first update is a candidate like the others."""
    evaluation_set = open_evaluation_set(quantized[0].config, digits, same_splits=True)
    plain = assemble(quantized, EnsembleSpec("soup", out), evaluation_set)
    real = tune_module.tune_config
    harm = {"optimizer": {"lr": 5.0, "name": "sgd", "schedule": "constant"}}
    monkeypatch.setattr(tune_module, "tune_config", lambda c, n: build_config([real(c, n).model_dump(), harm]))
    tuned = assemble(quantized, EnsembleSpec("soup", out, Recipe(tune_steps=2)), evaluation_set)
    assert tuned["test_accuracy"] == plain["test_accuracy"]


def test_weights_without_a_common_start_are_not_averaged(quantized, floats, train_member, out):
    stranger = train_member(model={"init_seed": 7})
    with pytest.raises(ConfigError, match=r"no common start: the seed of the random start is 0 and 7.*init_seed=0"):
        assemble([quantized[0], stranger], EnsembleSpec("soup", out))
    begun = stranger.result | {"forked_from_seed": 0, "forked_from_step": 2}
    check_one_start([quantized[0], replace(stranger, config=quantized[0].config, result=begun)])
    frozen = replace(quantized[1], config=with_model(quantized[1].config, freeze_bn=False))
    with pytest.raises(ConfigError, match=r"model\.freeze_bn True and False"):
        assemble([quantized[0], frozen], EnsembleSpec("diwa", out))
    with pytest.raises(ConfigError, match="takes quantized members"):
        assemble(floats, EnsembleSpec("soup", out))


def with_model(config, **changes):
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def test_a_soup_has_one_grid(quantized, train_member, out):
    other = train_member(quantizer={"bits": 5})
    with pytest.raises(ConfigError, match=r"differ in quantizer\.bits: 7 and 5"):
        assemble([quantized[0], other], EnsembleSpec("soup", out))
    assert assemble([quantized[0], other], EnsembleSpec("eoq", out))["kind"] == "eoq"


def test_a_quantizer_with_one_start_says_so(train_member, out):
    dorefa = {"name": "dorefa"}
    members = [train_member(quantizer=dorefa, train={"seed": seed}) for seed in (0, 1)]
    with pytest.raises(ConfigError, match="'dorefa' has one start of its own: add --refit init"):
        assemble(members, EnsembleSpec("soup", out))
    assert assemble(members, EnsembleSpec("soup", out, Recipe(refit="init")))["kind"] == "soup"


def test_codes_that_come_from_images_make_no_soup(quantized, out):
    config = quantized[0].config
    gptq = config.model_copy(update={"quantizer": config.quantizer.model_copy(update={"name": "gptq"})})
    with pytest.raises(ConfigError, match=r"'gptq' finds its codes from images.*or --kind eoq"):
        assemble([replace(member, config=gptq) for member in quantized], EnsembleSpec("soup", out))


def test_recipes_that_a_kind_does_not_read_are_refused(quantized, out):
    for kind, recipe, flag in (
        ("eoq", Recipe(pick="greedy"), "--pick is for --kind diwa or soup"),
        ("diwa", Recipe(refit="init"), "--refit is for --kind soup"),
        ("diwa", Recipe(tune_steps=1), "--tune is for --kind soup"),
    ):
        with pytest.raises(ConfigError, match=flag):
            assemble(quantized, EnsembleSpec(kind, out, recipe))
    for recipe in (Recipe(pick="greedy"), Recipe(tune_steps=1)):
        with pytest.raises(ConfigError, match="needs the images of the source domains"):
            assemble(quantized, EnsembleSpec("soup", out, recipe))
