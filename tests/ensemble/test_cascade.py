import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qtdog.core.errors import ConfigError
from qtdog.ensemble.assemble import EnsembleSpec, assemble
from qtdog.ensemble.cascade import (
    ASK_ALL,
    CascadeModel,
    cascade_logits,
    choose_threshold,
    confidence,
    measure_cascade,
    members_needed,
    plan_cascade,
    run_cascade,
)
from qtdog.ensemble.model import load_ensemble_model
from qtdog.ensemble.scoring import open_evaluation_set
from qtdog.training.calibration import LabeledLogits

logit_blocks = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(2, 4)), elements=st.floats(-9, 9, width=32)
).map(torch.from_numpy)


def members_of(logits):
    """Members that look their answers up: an input is the position of an image."""
    return lambda index, images: logits[index, images]


@given(logit_blocks, st.floats(0.1, 1.0), st.floats(0.5, 3.0))
def test_asking_one_by_one_gives_what_the_rule_says_of_all_logits(logits, threshold, temperature):
    n = logits.shape[1]
    groups = run_cascade(members_of(logits), len(logits), torch.arange(n), threshold=threshold, temperature=temperature)
    assert sorted(torch.cat([group.indices for group in groups]).tolist()) == list(range(n))
    depths = members_needed(logits, threshold, temperature)
    for group in groups:
        assert (depths[group.indices] == len(group.logits)).all()
        assert torch.equal(group.logits, logits[: len(group.logits), group.indices])


@given(logit_blocks, st.floats(0.5, 3.0))
def test_never_stopping_is_the_whole_ensemble_bit_for_bit(logits, temperature):
    n = logits.shape[1]
    (group,) = run_cascade(members_of(logits), len(logits), torch.arange(n), threshold=ASK_ALL, temperature=temperature)
    assert torch.equal(group.indices, torch.arange(n))
    assert torch.equal(group.logits, logits)


@given(logit_blocks, st.floats(0.1, 1.0))
def test_who_stops_early_has_members_that_agree_and_are_sure(logits, threshold):
    depths = members_needed(logits, threshold, 1.0)
    for image, k in enumerate(depths.tolist()):
        first = logits[:k, image]
        sure = first.mean(0).softmax(0).max().item()
        if k < len(logits):
            assert len(set(first.argmax(1).tolist())) == 1
            assert sure >= threshold - 1e-5
        torch.testing.assert_close(cascade_logits(logits, depths)[image], first.mean(0))


@given(logit_blocks)
def test_a_higher_threshold_asks_no_fewer_members(logits):
    depths = [members_needed(logits, threshold, 1.0) for threshold in (0.3, 0.6, 0.9, ASK_ALL)]
    assert all((low <= high).all() for low, high in itertools.pairwise(depths))
    assert (depths[-1] == len(logits)).all()


def test_the_threshold_costs_no_more_than_allowed_and_is_the_lowest_such():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2000,), generator=generator)
    signal = 2.0 * torch.nn.functional.one_hot(labels, 3)
    logits = signal + 1.5 * torch.randn(5, 2000, 3, generator=generator)
    for allowed in (0.0, 0.001, 0.01):
        found = choose_threshold(logits, labels, 1.0, allowed)
        assert found.accuracy >= found.accuracy_all - allowed
        assert found.accuracy_all == (logits.mean(0).argmax(1) == labels).double().mean().item()
        assert found.members < 5
        below = confidence(logits[:-1], 1.0)
        worse = below[(below > 0) & (below < found.value)].unique()[-20:]
        lost = [measure_cascade(logits, labels, value, 1.0) for value in worse.tolist()]
        assert any(one.accuracy < one.accuracy_all - allowed for one in lost)


def test_more_allowed_loss_never_asks_more_members():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (500,), generator=generator)
    logits = torch.nn.functional.one_hot(labels, 3) + torch.randn(4, 500, 3, generator=generator)
    asked = [choose_threshold(logits, labels, 1.0, allowed).members for allowed in (0.0, 0.01, 0.05)]
    assert asked == sorted(asked, reverse=True)


def test_the_target_has_no_say_in_the_threshold():
    generator = torch.Generator().manual_seed(2)
    source = LabeledLogits(torch.randn(3, 50, 4, generator=generator), torch.randint(0, 4, (50,), generator=generator))
    tests = [LabeledLogits(torch.randn(3, 9, 4, generator=generator), torch.zeros(9, dtype=torch.long)) for _ in "ab"]
    thresholds = [plan_cascade(source, test, 1.0)["threshold"] for test in tests]
    assert thresholds[0] == thresholds[1] == plan_cascade(source, None, 1.0)["threshold"]
    assert plan_cascade(None, tests[0], 1.0)["threshold"] is None


def test_an_ensemble_file_keeps_its_threshold_and_answers_with_it(quantized, digits, out):
    evaluation_set = open_evaluation_set(quantized[0].config, digits, same_splits=True)
    result = assemble(quantized, EnsembleSpec("eoq", out), evaluation_set)
    model = load_ensemble_model(out)
    assert model.info.cascade_threshold == result["cascade"]["threshold"]
    if result["cascade"]["threshold"] is not None:
        told = result["cascade"]["source"]
        assert told["accuracy"] >= told["accuracy_all"] - 0.001
    images = torch.randn(7, 1, 12, 12)
    object.__setattr__(model.info, "cascade_threshold", ASK_ALL)
    (group,) = CascadeModel(model).run(images)
    with torch.no_grad():
        assert torch.equal(group.logits, model.member_logits(images))


def test_an_ensemble_without_a_threshold_says_how_to_get_one(quantized, out):
    assemble(quantized, EnsembleSpec("eoq", out), None)
    with pytest.raises(ConfigError, match="has no threshold"):
        CascadeModel(load_ensemble_model(out))
