"""Graphs of networks that need a second look: attention with position bias, and products that never become integer."""

# pyright: reportArgumentType=false

from collections.abc import Callable
from dataclasses import replace

import onnx
import pytest
import torch
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from qtdog.conversion.attach import attach
from qtdog.conversion.load import plain_state_dict
from qtdog.conversion.save import save
from qtdog.core.errors import ModelError
from qtdog.export.export import export
from qtdog.export.inference_module import InferenceModule
from qtdog.export.packed_source import PackedSource
from qtdog.models.network import Network
from qtdog.packing.packed_file import load_packed


class Built(PackedSource):
    """A packed source of a network that has no name, so that it can be small."""

    make: Callable[[], Network]

    def module(self, *, float_activations: bool = False) -> InferenceModule:
        network = self.make()
        network.load_state_dict(plain_state_dict(self.members[0]))
        return InferenceModule([network], self.infos[0].preprocessing)


def built(make: Callable[[], nn.Module], like: PackedSource, folder, exclude: tuple[str, ...] = ()) -> Built:
    def network() -> Network:
        featurizer = make()
        n_features = featurizer(torch.zeros(1, 3, 32, 32)).shape[1]
        return Network(featurizer, nn.Linear(n_features, 3), freeze_bn=True).eval()

    torch.manual_seed(0)
    trained = network()
    trained.classifier.weight.data *= 30
    attach(trained, exclude=["classifier", *exclude]).enable()
    path = folder / "model.safetensors"
    save(trained, path)
    found = Built(path, (load_packed(path),), like.infos)
    object.__setattr__(found, "make", network)
    return found


def relative_position_vit() -> nn.Module:
    return VisionTransformerRelPos(
        img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=0, rel_pos_type="bias"
    )


def max_vit() -> nn.Module:
    attention = MaxxVitTransformerCfg(dim_head=8, rel_pos_type="bias", window_size=(4, 4), grid_size=(4, 4))
    made = MaxxVitCfg(embed_dim=(16,), depths=(1,), block_type=("T",), stem_width=8, transformer_cfg=attention)
    return MaxxVit(replace(made, head_hidden_size=None), img_size=32, num_classes=0)


def test_attention_with_position_bias_becomes_integer_though_its_fused_form_has_none(source, photos, tmp_path):
    packed = built(relative_position_vit, source("test_resnet"), tmp_path)
    made = export(packed, tmp_path / "m.onnx", "onnx-int8", photos, n_calibration=8)
    assert made.info.integer_products is not None
    n_integer, n_products = made.info.integer_products
    assert n_integer == n_products - 1  # the classifier stays float
    assert made.parity.agreement_frac > 0.85
    model = onnx.load(made.path)
    assert (model.ir_version, [entry.version for entry in model.opset_import if not entry.domain]) == (8, [18])


def test_every_product_of_a_max_vit_is_integer_and_it_answers_alike(source, photos, tmp_path):
    packed = built(max_vit, source("test_resnet"), tmp_path, ("*.rel_pos",))
    made = export(packed, tmp_path / "m.onnx", "onnx-int8", photos, n_calibration=8)  # compares in onnxruntime
    n_quantized = len(packed.members[0].quantized)
    assert made.info.integer_products == (n_quantized, n_quantized + 1)  # the classifier stays float
    assert made.parity.agreement_frac > 0.85
    assert made.parity.rms_difference < 0.1 * made.parity.largest_logit


def deconvolution() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(3, 8, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_network_without_any_integer_product_is_refused(source, photos, tmp_path):
    packed = built(deconvolution, source("test_resnet"), tmp_path)
    with pytest.raises(ModelError, match="none of its 2 products could become integer"):
        export(packed, tmp_path / "m.onnx", "onnx-int8", photos)
    assert not (tmp_path / "m.onnx").exists()
