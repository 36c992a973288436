"""An ensemble answers with the mean of its members' logits, from memory and from its file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qtdog.core.errors import FormatError
from qtdog.ensemble.model import BATCH, EnsembleInfo, EnsembleModel, build_model, load, load_ensemble_model
from qtdog.packing.ensemble_file import load_ensemble, save_ensemble
from qtdog.packing.packed_file import PackedModel
from qtdog.training.load_model import LoadedModel, load_model

ABOUT = {"kind": "eoq", "accuracy": {"source": None, "test": 0.5}, "training_steps": 18, "training_runs": 3.0}


@pytest.fixture(scope="module")
def path(quantized, tmp_path_factory):
    file = tmp_path_factory.mktemp("ensemble") / "model.safetensors"
    save_ensemble(file, [member.packed for member in quantized], ABOUT)
    return file


@pytest.fixture
def images():
    return torch.rand(9, 1, 12, 12, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_each_member_answers_as_its_own_file_does(path, quantized, images):
    model = load_ensemble_model(path)
    expected = torch.stack([load_model(member.path / "model.safetensors")(images) for member in quantized])
    assert torch.equal(model.member_logits(images), expected)
    assert not model.training


@torch.no_grad()
def test_the_answer_is_the_mean_logit_in_float64(path, images):
    model = load_ensemble_model(path)
    logits = model.member_logits(images).double().numpy()
    mean = logits.mean(0)
    np.testing.assert_allclose(model(images).numpy(), mean, rtol=1e-6, atol=1e-6)
    pixels = (images[:, 0, :, :, None] * 255).to(torch.uint8)
    shown = model.member_logits(model.prepare(pixels)).double().numpy().mean(0)
    exponents = np.exp(shown - shown.max(1, keepdims=True))
    np.testing.assert_allclose(
        model.probabilities(pixels).numpy(), exponents / exponents.sum(1, keepdims=True), atol=1e-6
    )


class Counting(nn.Module):
    """Remembers how many images it was asked at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.asked: list[int] = []

    def forward(self, images):
        self.asked.append(len(images))
        return images.mean((2, 3)).repeat(1, 10)


def test_probabilities_of_many_images_are_asked_in_portions(quantized):
    info = EnsembleInfo("eoq", tuple(member.info for member in quantized), {}, 0, 0.0)
    members = [Counting(), Counting()]
    model = EnsembleModel(members, info)  # pyright: ignore[reportArgumentType]
    pixels = torch.zeros(2 * BATCH + 3, 12, 12, 1, dtype=torch.uint8)
    assert model.probabilities(pixels).shape == (2 * BATCH + 3, 10)
    assert [member.asked for member in members] == [[BATCH, BATCH, 3]] * 2


def test_info_is_that_of_the_members(path, quantized):
    info = load_ensemble_model(path).info
    assert info.members == tuple(member.info for member in quantized)
    assert (info.kind, info.accuracy, info.training_steps) == ("eoq", ABOUT["accuracy"], 18)
    for name in ("backbone", "classes", "preprocessing", "source_domains", "target_domain"):
        assert getattr(info, name) == getattr(quantized[0].info, name)


def test_load_any_takes_both_kinds_and_load_names_an_ensemble(path, quantized):
    assert isinstance(load(path), EnsembleModel)
    assert isinstance(load(quantized[0].path / "model.safetensors"), LoadedModel)
    with pytest.raises(FormatError, match=r"holds an ensemble, not one model: read it with qtdog\.load$"):
        load_model(path)
    with pytest.raises(FormatError, match="one model, no ensemble"):
        load_ensemble_model(quantized[0].path / "model.safetensors")


def test_build_model_does_not_share_what_trains(quantized):
    info = EnsembleInfo("eoq", tuple(member.info for member in quantized), {}, 0, 0.0)
    model = build_model(quantized[0].path, [member.packed for member in quantized], info)
    owners = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(owners)) == len(owners)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "soup"}, "is ensemble or eoa or eoq, found 'soup'"),
        ({"kind": "../x"}, r"found '\.\./x'"),
        ({"training_steps": -1}, "training_steps"),
        ({"accuracy": "high"}, "accuracy"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(quantized, tmp_path, change, message):
    save_ensemble(tmp_path / "x", [member.packed for member in quantized], ABOUT | change)
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "x")


def test_members_of_several_sorts_are_refused(path, tmp_path):
    first, second, _ = load_ensemble(path).members
    for change in ({"backbone": "mnist_cnn"}, {"classes": list("abcdefghij")}):
        other = PackedModel(second.quantized, second.rest, second.metadata | change)
        save_ensemble(tmp_path / "x", [first, other], ABOUT)
        with pytest.raises(FormatError, match=f"have one {next(iter(change))}, found several"):
            load(tmp_path / "x")
