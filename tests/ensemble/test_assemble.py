"""From run folders to one file: what goes together, what is measured, what it costs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from qtdog.core.errors import ConfigError, DataError, RunError
from qtdog.ensemble.assemble import EnsembleSpec, assemble, best_first, cost, finished, members_hash
from qtdog.ensemble.model import check_alike, fitting_kind, load, load_ensemble_model, read_member, share_splits
from qtdog.ensemble.scoring import open_evaluation_set
from qtdog.ensemble.weight_averaging import Recipe

FLOAT = {"name": "none", "start_step": None}


@pytest.fixture(scope="module")
def evaluation_set(quantized, digits):
    return open_evaluation_set(quantized[0].config, digits, same_splits=True)


def test_members_are_measured_as_in_their_runs(quantized, evaluation_set, out):
    result = assemble(quantized, EnsembleSpec("eoq", out), evaluation_set)
    assert json.loads(out.with_name("result.json").read_text()) == result
    for k, member in enumerate(best_first(quantized)):
        source = [part["member_accuracies"][k] for part in result["domains"]["source"].values()]
        assert np.mean(source) == pytest.approx(member.result["source_accuracy"], abs=1e-12)
        assert result["domains"]["test"]["75"]["member_accuracies"][k] == member.result["test_accuracy"]
        assert result["members"][k]["test_accuracy"] == member.result["test_accuracy"]
    mean = np.mean([member.result["test_accuracy"] for member in quantized])
    assert result["member_mean"]["test_accuracy"] == pytest.approx(mean)
    assert (result["training_steps"], result["training_runs"], result["inference_passes"]) == (18, 3.0, 3)


def test_accuracy_is_that_of_the_file(quantized, evaluation_set, digits, out):
    result = assemble(quantized, EnsembleSpec("eoq", out), evaluation_set)
    model = load(out)
    images = evaluation_set.cache.gather(digits.indices("75"))
    right = model.probabilities(images).argmax(1).numpy() == digits.class_index[digits.indices("75")]
    assert result["test_accuracy"] == right.mean()
    assert model.info.accuracy == {"source": result["source_accuracy"], "test": result["test_accuracy"]}
    assert result["size"]["bytes"] == out.stat().st_size


def test_without_images_nothing_is_claimed(quantized, out):
    result = assemble(quantized, EnsembleSpec("eoq", out))
    assert result["source_accuracy"] is None
    assert result["test_accuracy"] is None
    assert load(out).info.accuracy == {"source": None, "test": None}


def test_other_images_than_those_of_training_are_refused(quantized, image_tree):
    from qtdog.data.open import open_dataset

    with pytest.raises(DataError, match="changed since"):
        open_evaluation_set(quantized[0].config, open_dataset(str(image_tree)), same_splits=True)


def test_kind_follows_the_members(quantized, floats, train_member, out):
    averaged = [
        train_member(quantizer=FLOAT, averager={"name": "sma", "params": {"start": 1}}, train={"seed": seed})
        for seed in (0, 1)
    ]
    assert [fitting_kind(members) for members in (quantized, averaged, floats)] == ["eoq", "eoa", "ensemble"]
    assert assemble(averaged, EnsembleSpec("eoa", out))["kind"] == "eoa"
    assert load_ensemble_model(out).info.members[0].bits is None
    for members, kind, message in (
        (floats, "eoq", "takes quantized members; .* is float"),
        (floats, "eoa", "takes averaged members"),
        (quantized, "ensemble", "takes float members; .* is quantized"),
        (quantized, "eog", "unknown kind of ensemble 'eog'; did you mean 'eo"),
    ):
        with pytest.raises(ConfigError, match=message):
            assemble(members, EnsembleSpec(kind, out))
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
    assemble(quantized, EnsembleSpec("eoq", out))
    with pytest.raises(ConfigError, match="holds an ensemble; give the runs"):
        read_member(out.parent)


def test_a_run_is_not_overwritten(quantized):
    with pytest.raises(RunError, match="holds a run, and its result"):
        assemble(quantized, EnsembleSpec("eoq", quantized[0].path / "ensemble.safetensors"))


def test_different_splits_leave_no_score_on_the_sources(quantized, train_member, digits, out):
    members = [quantized[0], train_member(data={"trial": 1})]
    assert not share_splits(members)
    evaluation_set = open_evaluation_set(members[0].config, digits, same_splits=False)
    result = assemble(members, EnsembleSpec("eoq", out), evaluation_set)
    assert "held out different images" in result["no_source_score"]
    assert result["source_accuracy"] is None
    assert result["domains"]["source"] == result["test_accuracy_80"] == {}
    assert result["domains"]["test"]["75"]["member_accuracies"][1] == members[1].result["test_accuracy"]
    with pytest.raises(ConfigError, match="source images that no member was trained on"):
        assemble(members, EnsembleSpec("diwa", out, Recipe(pick="greedy")), evaluation_set)


def test_members_trained_on_the_held_out_images_have_no_score_on_the_sources(train_member, digits, out):
    data = {"target": "75", "batch_size": 8, "image_size": 12, "train_on_heldout": True}
    train = {"steps": 3, "eval_every": 3, "selection": "last"}
    members = [train_member(data=data, train=train | {"seed": seed}) for seed in range(2)]
    result = assemble(
        members, EnsembleSpec("eoq", out), open_evaluation_set(members[0].config, digits, same_splits=True)
    )
    assert result["no_source_score"] == "the members were trained on the held-out images too"
    assert (result["source_accuracy"], result["domains"]["source"]) == (None, {})
    assert result["calibration"]["temperature"] == 1.0
    assert result["test_accuracy"] is not None


def test_in_domain_scores_are_on_the_third_part(train_member, digits, out):
    mode = {"test_mode": "in-domain"}
    members = [train_member(data=mode, quantizer=FLOAT, train={"seed": seed}) for seed in (0, 1)]
    for same_splits in (True, False):
        evaluation_set = open_evaluation_set(members[0].config, digits, same_splits=same_splits)
        result = assemble(members, EnsembleSpec("ensemble", out), evaluation_set)
        if same_splits:
            found = [part["member_accuracies"][0] for part in result["domains"]["test"].values()]
            assert np.mean(found) == pytest.approx(best_first(members)[0].result["test_accuracy"])
        else:
            assert result["domains"]["test"] == {}


def test_what_was_made_is_found_again_until_something_changes(quantized, out):
    spec = EnsembleSpec("eoq", out)
    assert finished(quantized, spec) is None
    result = assemble(quantized, spec)
    assert finished(quantized, spec) == result
    assert finished(quantized[:2], spec) is None
    out.write_bytes(out.read_bytes() + b"\0")
    assert finished(quantized, spec) is None


def test_what_was_averaged_by_another_recipe_is_made_anew(quantized, out):
    result = assemble(quantized, EnsembleSpec("soup", out))
    assert finished(quantized, EnsembleSpec("soup", out)) == result
    for other in (Recipe(pick="greedy"), Recipe(refit="init"), Recipe(tune_steps=3)):
        assert finished(quantized, EnsembleSpec("soup", out, other)) is None
    (out.parent / "result.json").write_text(json.dumps(result | {"recipe": None}))
    with pytest.raises(RunError, match="does not hold what an ensemble writes"):
        finished(quantized, EnsembleSpec("soup", out))


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


def test_the_best_member_on_the_sources_stands_first_and_the_target_has_no_say(quantized):
    first, second, third = quantized
    told = [(first, 0.5, 0.9), (second, 0.7, 0.1), (third, 0.6, 0.5)]
    scored = [
        dataclasses.replace(member, result=member.result | {"source_accuracy": source, "test_accuracy": test})
        for member, source, test in told
    ]
    assert [member.path for member in best_first(scored)] == [second.path, third.path, first.path]
    unknown = dataclasses.replace(first, result=first.result | {"source_accuracy": None})
    assert best_first([unknown, *scored[1:]]) == [unknown, *scored[1:]]
