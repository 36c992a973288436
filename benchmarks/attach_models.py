"""Well-known models of torchvision, timm, transformers and plain torch: attach, enable, save, load, compare.

Prints the table of docs/results/attach.md. Weights are random: nothing is fetched. One core needs about ten minutes:

    python benchmarks/attach_models.py [NAME …] > docs/results/attach_table.md
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import qtdog

BITS = 7
IMAGE = (1, 3, 224, 224)
SMALL = (1, 3, 96, 96)


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. (2015) with three levels and transposed convolutions on the way up."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width]
        self.down = nn.ModuleList(self._double(a, b) for a, b in pairwise(sizes))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(sizes[1:]))
        self.merge = nn.ModuleList(self._double(2 * a, a) for a in sizes[1:-1])
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _double(n_in: int, n_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, padding=1),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return two maps of the size of the image."""
        kept = []
        for block in self.down:
            x = block(nn.functional.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        for up, merge, skip in zip(reversed(self.up), reversed(self.merge), reversed(kept[:-1]), strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.head(x)


class Recurrent(nn.Module):
    """A classifier of token sequences: embedding, two recurrent layers in both directions, head."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10_000, 128)
        self.cell = cell(128, 256, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(512, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the sequence."""
        return self.head(self.cell(self.tokens(tokens))[0].mean(1))


def _vision(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


def _hf(model: str, config: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    "torchvision resnet18": (_vision("resnet18"), SMALL),
    "torchvision resnet50": (_vision("resnet50"), SMALL),
    "torchvision mobilenet_v2": (_vision("mobilenet_v2"), SMALL),
    "torchvision mobilenet_v3_small": (_vision("mobilenet_v3_small"), SMALL),
    "torchvision efficientnet_b0": (_vision("efficientnet_b0"), SMALL),
    "torchvision densenet121": (_vision("densenet121"), SMALL),
    "torchvision shufflenet_v2_x1_0": (_vision("shufflenet_v2_x1_0"), SMALL),
    "torchvision squeezenet1_1": (_vision("squeezenet1_1"), SMALL),
    "torchvision regnet_y_400mf": (_vision("regnet_y_400mf"), SMALL),
    "torchvision convnext_tiny": (_vision("convnext_tiny"), SMALL),
    "torchvision swin_t": (_vision("swin_t"), SMALL),
    "torchvision lraspp_mobilenet_v3_large": (_vision("lraspp_mobilenet_v3_large", weights_backbone=None), SMALL),
    "timm tf_efficientnet_lite0": (_timm("tf_efficientnet_lite0"), SMALL),
    "timm vit_tiny_patch16_224": (_timm("vit_tiny_patch16_224"), IMAGE),
    "timm deit_small_patch16_224": (_timm("deit_small_patch16_224"), IMAGE),
    "timm mixer_s32_224": (_timm("mixer_s32_224"), IMAGE),
    "timm mobilevit_s": (_timm("mobilevit_s"), (1, 3, 256, 256)),
    "timm nf_resnet26": (_timm("nf_resnet26"), SMALL),
    "timm resnetv2_50": (_timm("resnetv2_50"), SMALL),
    "timm ghostnet_100": (_timm("ghostnet_100"), SMALL),
    "timm poolformer_s12": (_timm("poolformer_s12"), SMALL),
    "timm xcit_nano_12_p16_224": (_timm("xcit_nano_12_p16_224"), IMAGE),
    "timm edgenext_small": (_timm("edgenext_small"), SMALL),
    "transformers BERT (small)": (
        _hf(
            "BertModel",
            "BertConfig",
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
        ),
        None,
    ),
    "transformers DistilBERT": (_hf("DistilBertModel", "DistilBertConfig", n_layers=3), None),
    "transformers ALBERT base": (
        _hf("AlbertModel", "AlbertConfig", hidden_size=768, num_attention_heads=12, intermediate_size=3072),
        None,
    ),
    "transformers ELECTRA small": (_hf("ElectraModel", "ElectraConfig"), None),
    "transformers GPT-2 (4 layers)": (_hf("GPT2Model", "GPT2Config", n_layer=4, n_embd=256, n_head=4), None),
    "U-Net": (UNet, SMALL),
    "LSTM": (lambda: Recurrent(nn.LSTM), None),
    "GRU": (lambda: Recurrent(nn.GRU), None),
}


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the first tensor that a model answers with."""
    with torch.no_grad():
        found = model(inputs)
    while not isinstance(found, Tensor):
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    return found


def row(name: str, folder: Path) -> str:
    """Return one row of the table."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    inputs = torch.randint(1000, (1, 32)) if shape is None else torch.randn(shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantizers = qtdog.attach(model, bits=BITS)
    told = [str(one.message) for one in caught if "left in float" in str(one.message)]
    quantizers.enable()
    trained = outputs(model, inputs)
    qtdog.save(model, folder / "packed")
    fresh = make()
    n_float = sum(value.numel() * value.element_size() for value in fresh.state_dict().values())
    loaded = outputs(qtdog.load_into(folder / "packed", fresh), inputs)
    same = "yes" if torch.equal(loaded, trained) else f"to {(loaded - trained).abs().max().item():.0e}"
    n_packed = (folder / "packed").stat().st_size
    found = quantizers.coverage
    named = ", ".join(f"`{left.name}`" for left in found.left[:3]) or "–"
    more = f" and {len(found.left) - 3} more" if len(found.left) > 3 else ""
    named += f"{more}{' (warned)' if told else ''}"
    parts = [name, len(quantizers.layers), f"{found.quantized_frac:.1%}", f"{n_float:,}", f"{n_packed:,}"]
    return f"| {' | '.join(map(str, [*parts, f'{n_float / n_packed:.2f}', same, named]))} |"


def main(names: list[str]) -> None:
    """Print the table, row by row."""
    print(
        "| model | layers | parameters quantized | float bytes | 7-bit bytes | ratio | same outputs | left in float |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in names or MODELS:
            print(row(name, Path(folder)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
