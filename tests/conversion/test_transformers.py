"""Transformers for images and text: attach, train a step, pack, load, and answer the same."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from qtdog.conversion.attach import attach
from qtdog.conversion.load import load_into
from qtdog.conversion.save import save
from qtdog.packing.packed_file import load_packed
from qtdog.packing.sizes import file_sizes


class TextEncoder(nn.Module):
    """A classifier of token sequences with DistilBERT's sizes unless made smaller: embeddings, encoder, linear head."""

    def __init__(self, *, vocabulary=30522, width=768, layers=6, heads=12, tied=False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(512, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, 5)
        if tied:
            self.predict = nn.Linear(width, vocabulary, bias=False)
            self.predict.weight = self.tokens.weight

    def forward(self, tokens):
        hidden = self.encoder(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        return self.classifier(hidden.mean(1))


def train_pack_and_load(make, inputs, path, bits=7):
    torch.manual_seed(0)
    model = make()
    quantizers = attach(model, bits=bits, exclude=[name for name in ("classifier", "head") if hasattr(model, name)])
    quantizers.enable()
    optimizer = torch.optim.SGD(quantizers.param_groups(0.1))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    nn.functional.cross_entropy(model(inputs), torch.zeros(len(inputs), dtype=torch.long)).backward()
    optimizer.step()
    still = [
        name for name, value in model.named_parameters() if value.requires_grad and torch.equal(value, before[name])
    ]
    save(model, path)
    with torch.no_grad():
        shipped, trained = load_into(path, make())(inputs), model.eval()(inputs)
    return quantizers, still, shipped, trained


def test_deit_small(tmp_path):
    images = torch.randn(1, 3, 224, 224)
    make = lambda: timm.create_model("deit_small_patch16_224", num_classes=7)  # noqa: E731
    quantizers, still, shipped, trained = train_pack_and_load(make, images, tmp_path / "m")
    assert len(quantizers.layers) == 1 + 12 * 4
    assert still == []
    assert torch.equal(shipped, trained)
    assert file_sizes(tmp_path / "m").ratio > 4.4


@pytest.mark.stress
def test_a_text_encoder_of_the_size_of_distilbert(tmp_path):
    tokens = torch.randint(0, 30522, (2, 16), generator=torch.Generator().manual_seed(0))
    quantizers, still, shipped, trained = train_pack_and_load(TextEncoder, tokens, tmp_path / "m")
    names = {name.rpartition(".")[2] for name in quantizers.layers}
    assert names == {"tokens", "positions", "in_proj_weight", "out_proj", "linear1", "linear2"}
    assert still == []
    torch.testing.assert_close(shipped, trained, rtol=0, atol=1e-5)
    assert file_sizes(tmp_path / "m").ratio > 4.4


@pytest.mark.parametrize("bits", [2, 8])
def test_a_tied_embedding_is_quantized_once(tmp_path, bits):
    make = lambda: TextEncoder(vocabulary=100, width=32, layers=1, heads=4, tied=True)  # noqa: E731
    tokens = torch.randint(0, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    quantizers, _, shipped, trained = train_pack_and_load(make, tokens, tmp_path / "m", bits)
    assert quantizers.layers["tokens"] is quantizers.layers["predict"]
    torch.testing.assert_close(shipped, trained, rtol=0, atol=1e-5)
    packed = load_packed(tmp_path / "m")
    assert packed.quantized["tokens.weight"] is packed.quantized["predict.weight"]


def test_bits_per_layer_by_pattern():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, depth=2)
    layers = attach(model, bits=4, layer_bits={"blocks": 6, "blocks.*.attn": 8, "patch_embed": 8}).layers
    assert {name: quantizer.spec.bits for name, quantizer in layers.items()} == {
        "patch_embed.proj": 8,
        **{f"blocks.{i}.{name}": 8 for i in (0, 1) for name in ("attn.qkv", "attn.proj")},
        **{f"blocks.{i}.{name}": 6 for i in (0, 1) for name in ("mlp.fc1", "mlp.fc2")},
        "head": 4,
    }
