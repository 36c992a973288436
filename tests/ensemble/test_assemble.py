"""From run folders to one file: what goes together, what is measured, what it costs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from qtdog.core.errors import ConfigError, DataError, RunError
from qtdog.core.quantized import QuantSpec
from qtdog.ensemble.assemble import Order, assemble, finished, members_hash
from qtdog.ensemble.average import average, read_latent
from qtdog.ensemble.cost import cost
from qtdog.ensemble.exam import open_exam
from qtdog.ensemble.kinds import fitting_kind
from qtdog.ensemble.load import load_any, load_ensemble_model
from qtdog.ensemble.member import check_alike, check_one_start, read_member, share_splits
from qtdog.ensemble.one_model import Recipe
from qtdog.packing.packed_file import load_packed
from qtdog.quantizers.lsq import initial_scale
from qtdog.training.shipped import ShippedModel, load

FLOAT = {"name": "none", "start_step": None}


@pytest.fixture(scope="module")
def exam(quantized, digits):
    return open_exam(quantized[0].config, digits, same_splits=True)


def test_members_are_measured_as_in_their_runs(quantized, exam, out):
    result = assemble(quantized, Order("eoq", out), exam)
    assert json.loads(out.with_name("result.json").read_text()) == result
    for k, member in enumerate(quantized):
        source = [part["member_accuracies"][k] for part in result["domains"]["source"].values()]
        assert np.mean(source) == pytest.approx(member.result["source_accuracy"], abs=1e-12)
        assert result["domains"]["test"]["75"]["member_accuracies"][k] == member.result["test_accuracy"]
        assert result["members"][k]["test_accuracy"] == member.result["test_accuracy"]
    mean = np.mean([member.result["test_accuracy"] for member in quantized])
    assert result["member_mean"]["test_accuracy"] == pytest.approx(mean)
    assert (result["training_steps"], result["training_runs"], result["inference_passes"]) == (18, 3.0, 3)


def test_accuracy_is_that_of_the_file(quantized, exam, digits, out):
    result = assemble(quantized, Order("eoq", out), exam)
    model = load_any(out)
    images = exam.cache.gather(digits.indices("75"))
    right = model.probabilities(images).argmax(1).numpy() == digits.class_index[digits.indices("75")]
    assert result["test_accuracy"] == right.mean()
    assert model.info.accuracy == {"source": result["source_accuracy"], "test": result["test_accuracy"]}
    assert result["size"]["bytes"] == out.stat().st_size


def test_without_images_nothing_is_claimed(quantized, out):
    result = assemble(quantized, Order("eoq", out))
    assert result["source_accuracy"] is None
    assert result["test_accuracy"] is None
    assert load_any(out).info.accuracy == {"source": None, "test": None}


def test_other_images_than_those_of_training_are_refused(quantized, image_tree):
    from qtdog.data.open import open_dataset

    with pytest.raises(DataError, match="changed since"):
        open_exam(quantized[0].config, open_dataset(str(image_tree)), same_splits=True)


def test_kind_follows_the_members(quantized, floats, train_member, out):
    averaged = [
        train_member(quantizer=FLOAT, averager={"name": "sma", "params": {"start": 1}}, train={"seed": seed})
        for seed in (0, 1)
    ]
    assert [fitting_kind(members) for members in (quantized, averaged, floats)] == ["eoq", "eoa", "ensemble"]
    assert assemble(averaged, Order("eoa", out))["kind"] == "eoa"
    assert load_ensemble_model(out).info.members[0].bits is None
    for members, kind, message in (
        (floats, "eoq", "takes quantized members; .* is float"),
        (floats, "eoa", "takes averaged members"),
        (quantized, "ensemble", "takes float members; .* is quantized"),
        (quantized, "eog", "unknown kind of ensemble 'eog'; did you mean 'eo"),
    ):
        with pytest.raises(ConfigError, match=message):
            assemble(members, Order(kind, out))
    with pytest.raises(ConfigError, match="of several kinds"):
        fitting_kind([quantized[0], floats[0]])


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("classes", ("a", "b")),
        ("backbone", "mnist_cnn"),
        ("feature_layer", "mixstyle"),
        ("target_domain", None),
        ("source_domains", ("0", "15")),
    ],
)
def test_members_that_differ_are_refused_by_name(quantized, name, other):
    changed = replace(quantized[1], info=quantized[1].info.model_copy(update={name: other}))
    named = rf"{quantized[0].path} and {changed.path} differ in their {name.replace('_', ' ')}"
    with pytest.raises(ConfigError, match=named):
        check_alike([quantized[0], changed])


def test_members_of_other_image_sizes_are_refused(quantized, train_member):
    with pytest.raises(ConfigError, match="differ in their preprocessing"):
        check_alike([quantized[0], train_member(data={"image_size": 14})])


def test_one_or_the_same_twice_is_no_ensemble(quantized, tmp_path):
    with pytest.raises(ConfigError, match="two runs or more, not 1"):
        check_alike(quantized[:1])
    copy = tmp_path / "copy"
    shutil.copytree(quantized[0].path, copy)
    with pytest.raises(ConfigError, match="hold the same model"):
        check_alike([quantized[0], read_member(copy)])


def test_folders_that_are_no_finished_runs_are_refused(quantized, out, tmp_path):
    with pytest.raises(RunError, match="is no folder"):
        read_member(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"no config\.yaml"):
        read_member(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(quantized[0].path, copy)
    (copy / "model.safetensors").write_bytes((quantized[1].path / "model.safetensors").read_bytes())
    with pytest.raises(RunError, match="not the file that the run wrote"):
        read_member(copy)
    (copy / "result.json").unlink()
    with pytest.raises(RunError, match="not finished; go on with: qtdog train --resume"):
        read_member(copy)
    assemble(quantized, Order("eoq", out))
    with pytest.raises(ConfigError, match="holds an ensemble; give the runs"):
        read_member(out.parent)


def test_a_run_is_not_overwritten(quantized):
    with pytest.raises(RunError, match="holds a run, and its result"):
        assemble(quantized, Order("eoq", quantized[0].path / "ensemble.safetensors"))


def test_different_splits_leave_no_score_on_the_sources(quantized, train_member, digits, out):
    members = [quantized[0], train_member(data={"trial": 1})]
    assert not share_splits(members)
    exam = open_exam(members[0].config, digits, same_splits=False)
    result = assemble(members, Order("eoq", out), exam)
    assert "held out different images" in result["no_source_score"]
    assert result["source_accuracy"] is None
    assert result["domains"]["source"] == result["test_accuracy_80"] == {}
    assert result["domains"]["test"]["75"]["member_accuracies"][1] == members[1].result["test_accuracy"]
    with pytest.raises(ConfigError, match="source images that no member was trained on"):
        assemble(members, Order("diwa", out, Recipe(pick="greedy")), exam)


def test_in_domain_scores_are_on_the_third_part(train_member, digits, out):
    mode = {"test_mode": "in-domain"}
    members = [train_member(data=mode, quantizer=FLOAT, train={"seed": seed}) for seed in (0, 1)]
    for same_splits in (True, False):
        exam = open_exam(members[0].config, digits, same_splits=same_splits)
        result = assemble(members, Order("ensemble", out), exam)
        if same_splits:
            found = [part["member_accuracies"][0] for part in result["domains"]["test"].values()]
            assert np.mean(found) == pytest.approx(members[0].result["test_accuracy"])
        else:
            assert result["domains"]["test"] == {}


def test_what_was_made_is_found_again_until_something_changes(quantized, out):
    order = Order("eoq", out)
    assert finished(quantized, order) is None
    result = assemble(quantized, order)
    assert finished(quantized, order) == result
    assert finished(quantized[:2], order) is None
    out.write_bytes(out.read_bytes() + b"\0")
    assert finished(quantized, order) is None


def test_the_name_of_an_ensemble_is_that_of_its_members_in_any_order(quantized):
    assert members_hash(quantized, "eoq") == members_hash(quantized[::-1], "eoq")
    assert members_hash(quantized, "eoq") != members_hash(quantized[:2], "eoq") != members_hash(quantized[:2], "soup")


def forked(member, seed, step):
    return replace(member, result=member.result | {"forked_from_seed": seed, "forked_from_step": step})


def test_a_shared_beginning_is_paid_once(quantized):
    members = [replace(member, config=with_steps(member.config, 1000)) for member in [*quantized, *quantized[:2]]]
    assert cost(members, one_model=False).training_runs == 5
    shared = cost([forked(member, 0, 400) for member in members], one_model=False)
    assert (shared.training_steps, shared.inference_passes) == (3400, 5)
    assert shared.training_runs == pytest.approx(3.4)
    two = cost([forked(member, k % 2, 400) for k, member in enumerate(members)], one_model=True, extra_steps=100)
    assert (two.training_steps, two.inference_passes) == (3900, 1)


def with_steps(config, steps):
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def test_diwa_is_the_mean_of_the_weights(quantized, exam, out):
    result = assemble(quantized, Order("diwa", out), exam)
    expected = average([read_latent(member, print).state for member in quantized])
    packed = load_packed(out)
    assert packed.quantized == {}
    assert all(torch.equal(packed.rest[name], value) for name, value in expected.items())
    assert result["inference_passes"] == 1
    assert load(out).info.accuracy["test"] == result["test_accuracy"]
    assert packed.metadata["joined"]["kind"] == "diwa"


def test_soup_is_quantized_anew_from_the_mean(quantized, out):
    result = assemble(quantized, Order("soup", out))
    mean = average([read_latent(member, print).state for member in quantized])
    packed = load_packed(out)
    assert packed.quantized.keys() == quantized[0].packed.quantized.keys()
    for name, value in packed.quantized.items():
        assert torch.allclose(value.scale, initial_scale(mean[name], QuantSpec(7)), rtol=1e-6)
        inside = (value.codes > value.spec.qmin) & (value.codes < value.spec.qmax)
        error = (value.dequantize() - mean[name]).abs() <= 0.5001 * value.scale.reshape(-1, 1, 1, 1)
        assert error[inside].all()
    assert isinstance(load_any(out), ShippedModel)
    assert result["size"]["ratio"] > 3


def test_mse_refit_rounds_with_less_error(quantized, out):
    mean = average([read_latent(member, print).state for member in quantized])
    errors = {}
    for refit in ("init", "mse"):
        assemble(quantized, Order("soup", out, Recipe(refit=refit)))
        packed = load_packed(out)
        errors[refit] = sum(((v.dequantize() - mean[name]) ** 2).sum().item() for name, v in packed.quantized.items())
    assert errors["mse"] < 0.7 * errors["init"]


def test_greedy_average_is_at_least_as_good_as_its_best_member(floats, exam, out):
    result = assemble(floats, Order("diwa", out, Recipe(pick="greedy")), exam)
    assert result["source_accuracy"] >= max(member.result["source_accuracy"] for member in floats) - 1e-9
    assert result["recipe"]["used"][0] == int(np.argmax([member.result["source_accuracy"] for member in floats]))


def test_tuning_goes_on_from_the_soup_and_keeps_what_is_best_on_the_sources(quantized, exam, out):
    plain = assemble(quantized, Order("soup", out), exam)
    tuned = assemble(quantized, Order("soup", out, Recipe(tune_steps=4)), exam)
    again = assemble(quantized, Order("soup", out, Recipe(tune_steps=4)), exam)
    assert tuned["source_accuracy"] >= plain["source_accuracy"]
    assert tuned["model_sha256"] == again["model_sha256"]
    assert tuned["model_sha256"] != plain["model_sha256"]
    assert tuned["training_steps"] == plain["training_steps"] + 4


def test_tuning_changes_nothing_if_it_does_not_help(quantized, digits, out, monkeypatch):
    """The state before the first update is a candidate like the others."""
    from qtdog.ensemble import tune as module

    exam = open_exam(quantized[0].config, digits, same_splits=True)
    plain = assemble(quantized, Order("soup", out), exam)
    real = module.tune_config
    harm = {"optimizer": {"lr": 5.0, "name": "sgd", "schedule": "constant"}}
    from qtdog.core.settings import build_config

    monkeypatch.setattr(module, "tune_config", lambda c, n: build_config([real(c, n).model_dump(), harm]))
    tuned = assemble(quantized, Order("soup", out, Recipe(tune_steps=2)), exam)
    assert tuned["test_accuracy"] == plain["test_accuracy"]


def test_weights_without_a_common_start_are_not_averaged(quantized, floats, train_member, out):
    stranger = train_member(model={"init_seed": 7})
    with pytest.raises(ConfigError, match=r"no common start: the seed of the random start is 0 and 7.*init_seed=0"):
        assemble([quantized[0], stranger], Order("soup", out))
    check_one_start([quantized[0], forked(replace(stranger, config=quantized[0].config), 0, 2)])
    frozen = replace(quantized[1], config=with_model(quantized[1].config, freeze_bn=False))
    with pytest.raises(ConfigError, match=r"model\.freeze_bn True and False"):
        assemble([quantized[0], frozen], Order("diwa", out))
    with pytest.raises(ConfigError, match="takes quantized members"):
        assemble(floats, Order("soup", out))


def with_model(config, **changes):
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def test_a_soup_has_one_grid(quantized, train_member, out):
    other = train_member(quantizer={"bits": 5})
    with pytest.raises(ConfigError, match=r"differ in quantizer\.bits: 7 and 5"):
        assemble([quantized[0], other], Order("soup", out))
    assert assemble([quantized[0], other], Order("eoq", out))["kind"] == "eoq"


def test_recipes_that_a_kind_does_not_read_are_refused(quantized, out):
    for kind, recipe, flag in (
        ("eoq", Recipe(pick="greedy"), "--pick is for --kind diwa or soup"),
        ("diwa", Recipe(refit="mse"), "--refit is for --kind soup"),
        ("diwa", Recipe(tune_steps=1), "--tune is for --kind soup"),
    ):
        with pytest.raises(ConfigError, match=flag):
            assemble(quantized, Order(kind, out, recipe))
    for recipe in (Recipe(pick="greedy"), Recipe(tune_steps=1)):
        with pytest.raises(ConfigError, match="needs the images of the source domains"):
            assemble(quantized, Order("soup", out, recipe))
