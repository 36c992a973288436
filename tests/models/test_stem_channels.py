"""Further input channels take over RGB's pretrained weights as they are, as in DomainBed."""

from __future__ import annotations

import pytest
import timm
import torch

from qtdog.models.featurizers import FeaturizerSpec, build_featurizer


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channel_i_has_the_weights_of_rgb_channel_i_mod_3(channels):
    state = timm.create_model("resnet18.tv_in1k").state_dict()
    spec = FeaturizerSpec("resnet18.tv_in1k", channels=channels, image_size=32)
    weight = build_featurizer(spec, pretrained=True, state=state).get_parameter("conv1.weight")
    for i in range(channels):
        torch.testing.assert_close(weight[:, i], state["conv1.weight"][:, i % 3])


def test_a_context_of_zeros_changes_no_feature():
    state = timm.create_model("resnet18.tv_in1k").state_dict()
    specs = [FeaturizerSpec("resnet18.tv_in1k", channels=n, image_size=32) for n in (3, 4)]
    plain, wide = (build_featurizer(spec, pretrained=True, state=state).eval() for spec in specs)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = wide(torch.cat([images, torch.zeros(2, 1, 32, 32)], 1))
        torch.testing.assert_close(found, plain(images), rtol=1e-4, atol=1e-5)
