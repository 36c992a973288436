"""The memory claim, from the file on disk: five 7-bit members take less than one float model."""

from __future__ import annotations

import pytest
import torch

from qtdog.conversion.attach import attach
from qtdog.conversion.save import bake
from qtdog.models.backbones import create_network
from qtdog.packing.ensemble_file import save_ensemble
from qtdog.packing.packed_file import PackedModel
from qtdog.packing.sizes import ensemble_sizes


@pytest.fixture(scope="module")
def five_members():
    """Five members that differ in every weight; only what never trains (frozen statistics) is alike."""
    members = []
    for seed in range(5):
        network = create_network(
            "tf_efficientnet_lite0", n_classes=7, channels=3, image_size=64, weights="none", freeze_bn=True, seed=seed
        )
        generator = torch.Generator().manual_seed(seed)
        for tensor in network.parameters():
            tensor.data += 0.01 * torch.rand(tensor.shape, generator=generator)
        attach(network, bits=7, exclude=("classifier",)).enable()
        baked = bake(network)
        about = {"backbone": "tf_efficientnet_lite0", "seed": seed, "step": 5000}
        members.append(PackedModel(baked.quantized, baked.rest, about))
    return members


def with_other_statistics(member):
    """Return a member whose batch norms have measured something of their own."""
    generator = torch.Generator().manual_seed(member.metadata["seed"])
    rest = {
        name: value + 0.01 * torch.rand(value.shape, generator=generator) if ".running_" in name else value
        for name, value in member.rest.items()
    }
    return PackedModel(member.quantized, rest, member.metadata)


def test_five_lite0_members_take_three_quarters_of_one_float_model(five_members, tmp_path):
    save_ensemble(tmp_path / "x", five_members, {"kind": "eoq"})
    sizes = ensemble_sizes(tmp_path / "x")
    assert sizes.bytes == (tmp_path / "x").stat().st_size
    assert 0.7 < sizes.float32_models <= 0.78
    assert 0.9 < sizes.over_entropy <= 1.0
    # 49 batch norms, 21,008 channels: two float32 statistics each and an int64 counter, shared by four members
    assert sizes.shared_bytes == 4 * (21_008 * 2 * 4 + 49 * 8)


def test_statistics_that_moved_are_stored_for_each_member(five_members, tmp_path):
    save_ensemble(tmp_path / "x", [with_other_statistics(member) for member in five_members], {"kind": "eoq"})
    sizes = ensemble_sizes(tmp_path / "x")
    assert sizes.shared_bytes == 4 * 49 * 8
    assert 0.75 < sizes.float32_models <= 0.82
