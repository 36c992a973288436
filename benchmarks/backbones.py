"""Each known backbone with random weights: attach, one training step, pack, load, predict, and how large it is.

    python benchmarks/backbones.py [NAME …] [--bits 7] [--json FILE] [--markdown FILE]

Images have the size that the backbone was made for; the batch has two of them, or two texts of 64 tokens. The step is
one of plain SGD on all weights and step sizes. The loaded model must answer as the trained one does, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qtdog.conversion.attach import Attached, attach
from qtdog.conversion.load import load_into
from qtdog.conversion.save import save
from qtdog.core.files import write_atomic
from qtdog.models.backbones import KNOWN_BACKBONES, create_network
from qtdog.models.network import Network, input_size
from qtdog.models.weights import pretraining_of
from qtdog.packing.sizes import file_sizes
from qtdog.report.render import markdown

N_CLASSES = 7
N_IMAGES = 2
N_TOKENS = 64
HEADERS = [
    "backbone",
    "input",
    "parameters",
    "float32",
    "7 bits, file",
    "ratio",
    "bits per weight",
    "its own weights saw",
]


def make(name: str) -> Network:
    """Return the backbone with random weights and a head of seven classes."""
    channels = 1 if name.endswith("_cnn") else 3
    size = input_size(name) or 224
    return create_network(
        name, n_classes=N_CLASSES, channels=channels, image_size=size, weights="none", freeze_bn=True, seed=0
    )


def inputs(name: str) -> Tensor:
    """Return a batch that the backbone takes."""
    generator, size = torch.Generator().manual_seed(0), input_size(name)
    if size is None:
        return torch.randint(1, 8000, (N_IMAGES, N_TOKENS), generator=generator)
    return torch.randn(N_IMAGES, 1 if name.endswith("_cnn") else 3, size, size, generator=generator)


def train_step_(network: Network, quantizers: Attached, batch: Tensor) -> None:
    """Make one update."""
    torch.manual_seed(0)  # for dropout, which the text encoders have
    optimizer = torch.optim.SGD(quantizers.param_groups(1e-3), lr=1e-3)
    cross_entropy(network(batch), torch.arange(len(batch))).backward()
    optimizer.step()


@torch.no_grad()
def measure(name: str, bits: int, folder: Path) -> dict[str, Any]:
    """Return parameters and sizes of one backbone."""
    network, batch = make(name), inputs(name)
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    quantizers = attach(network, bits=bits, exclude=("classifier",))
    quantizers.enable()
    with torch.enable_grad():
        train_step_(network, quantizers, batch)
    unreached = [key for key, value in network.named_parameters() if value.grad is None]
    if unreached:
        raise SystemExit(f"{name}: no gradient reaches {', '.join(unreached)}")
    path = folder / "model.safetensors"
    save(network, path)
    loaded = load_into(path, make(name))
    if not torch.equal(network.eval()(batch), loaded(batch)):
        raise SystemExit(f"{name}: the loaded model answers differently")
    told = {"n_layers": len(quantizers.layers), "pretraining": pretraining_of(name)}
    size = {"input": list(batch.shape[1:]), "n_parameters": n_parameters}
    return {"backbone": name} | size | told | asdict(file_sizes(path))


def row(found: dict[str, Any]) -> list[str]:
    """Return the cells of one backbone in the table."""
    shape = found["input"]
    return [
        found["backbone"],
        f"{shape[-1]} px" if len(shape) == 3 else f"{shape[0]} tokens",
        f"{found['n_parameters']:,}",
        f"{found['float32_bytes']:,}",
        f"{found['bytes']:,}",
        f"{found['ratio']:.2f}",
        f"{found['bits_per_weight']:.2f}",
        found["pretraining"].partition(" (")[0] or "none",
    ]


def main() -> None:
    """Measure the backbones one after another; write what is done after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="default: all known ones")
    parser.add_argument("--bits", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or KNOWN_BACKBONES:
            results.append(measure(name, options.bits, Path(folder)))
            print("  ".join(row(results[-1])), file=sys.stderr)
    table = markdown(HEADERS, [row(found) for found in results])
    print(table)
    if options.json:
        write_atomic(options.json, json.dumps({"bits": options.bits, "results": results}, indent=1) + "\n")
    if options.markdown:
        write_atomic(options.markdown, table + "\n")


if __name__ == "__main__":
    main()
