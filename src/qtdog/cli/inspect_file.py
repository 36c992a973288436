"""`qtdog inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qtdog.packing.layout import Layout

TOLD = ("backbone", "classes", "bits", "dataset", "source_domains", "target_domain", "accuracy", "pretraining", "step")


def inspect_file(
    model: Annotated[Path, typer.Argument(help="A packed .safetensors file, or the folder of a run.", metavar="MODEL")],
    *,
    weights: Annotated[bool, typer.Option("--weights", help="List every quantized weight.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a packed model file says of itself, and where its bytes go.

    The bound is the entropy of the codes, each weight by its own frequencies, plus all other values as they are.

    Examples:
      qtdog inspect runs/photos-c

      qtdog inspect model.safetensors --weights
    """
    from qtdog.cli.console import print_json
    from qtdog.packing.ensemble_file import is_ensemble
    from qtdog.packing.reader import read_layout
    from qtdog.packing.sizes import ensemble_sizes, file_sizes

    path = model / "model.safetensors" if model.is_dir() else model
    size = asdict(ensemble_sizes(path) if is_ensemble(path) else file_sizes(path))
    layout = read_layout(path)[1]
    rows = _weights(path) if weights else []
    if as_json:
        print_json({"model": str(path), "metadata": layout.metadata, "size": size, "weights": rows})
        return
    _show(layout, size)
    if weights:
        _show_weights(rows)


def _weights(path: Path) -> list[dict[str, Any]]:
    """Return for each stored quantized weight its grid, its codec, and what its codes cost beside their entropy."""
    from qtdog.packing.layout import stored_names
    from qtdog.packing.packed_file import read_contents
    from qtdog.packing.reader import read_layout
    from qtdog.packing.sizes import entropy_bits

    header, layout = read_layout(path)
    contents = read_contents(path, layout)
    rows = []
    for name, entry in layout.quantized.items():
        stored = header.tensors[stored_names(name)[0]].n_bytes
        row = {"weight": name, "shape": list(entry.shape), "bits": entry.spec.bits, "levels": entry.spec.levels}
        row |= {"codec": entry.codec, "bits_per_code": 8 * stored / entry.n_codes}
        rows.append(row | {"entropy_bits_per_code": entropy_bits(contents.quantized[name].codes)})
    return rows


def _show(layout: Layout, size: dict[str, Any]) -> None:
    from qtdog.cli.console import print_table

    about, ensemble = layout.metadata, layout.metadata.get("ensemble")
    kind = f"ensemble of {size['n_members']}" if ensemble else "one model"
    rows = [*([name, _text(about[name])] for name in TOLD if name in about)]
    one = " of one member" if ensemble else ""
    rows += [
        ["file", f"{size['bytes']:,} bytes"],
        [f"float32{one}", f"{size['float32_bytes']:,} bytes, {size['ratio']:.2f} times the file"],
        ["bits per code", f"{size['bits_per_code']:.3f}, their entropy {size['entropy_bits_per_code']:.3f}"],
        ["file ÷ bound", f"{size['over_entropy']:.3f}"],
    ]
    print_table(["", kind], rows)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:12])) + (f" … ({len(value)})" if len(value) > 12 else "")
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _show_weights(rows: list[dict[str, Any]]) -> None:
    from qtdog.cli.console import print_table

    headers = ["weight", "shape", "bits", "levels", "codec", "bits per code", "entropy"]
    lines = []
    for row in rows:
        shape = " × ".join(map(str, row["shape"]))
        costs = (f"{row[key]:.3f}" for key in ("bits_per_code", "entropy_bits_per_code"))
        lines.append([row["weight"], shape, str(row["bits"]), row["levels"], row["codec"], *costs])
    print_table(headers, lines)
