"""`qtdog list`: the names that options take; `qtdog inspect`: what a model file holds."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtdog.cli.options import JsonOutput, Model

if TYPE_CHECKING:
    from qtdog.core.registry import Registry
    from qtdog.packing.layout import Layout


BITS = 7
MAX_MEASURED = 40  # building a model without memory takes about a tenth of a second
NO_SIZE = "–"


def show_backbones(pattern: str, *, as_json: bool) -> None:
    """Print the known backbones, or all whose name contains `pattern` (JSON says more of each)."""
    from qtdog.cli.console import err, print_json, print_table

    rows = backbone_rows(pattern)
    if as_json:
        print_json(rows)
        return
    print_table(["backbone", "parameters", f"{BITS} bits", "its weights saw"], [_cells(row) for row in rows])
    if not pattern:
        err.print("These are tested; every other timm model works too: qtdog list backbones NAME", highlight=False)
    elif len(rows) > MAX_MEASURED:
        err.print(f"{len(rows)} names: sizes are shown for at most {MAX_MEASURED}; narrow the pattern", highlight=False)


def backbone_rows(pattern: str) -> list[dict[str, Any]]:
    """Return one row per backbone, without its classifier; sizes are missing where there are too many names."""
    from qtdog.models.backbones import KNOWN_BACKBONES, backbone_names
    from qtdog.training.plugins import load_entry_points, member_origins

    load_entry_points()
    names = [*(name for axis, name in member_origins() if axis == "backbone"), *KNOWN_BACKBONES]
    if pattern:
        names = [name for name in dict.fromkeys([*names, *backbone_names()]) if pattern in name.lower()]
    return [_row(name, sized=len(names) <= MAX_MEASURED) for name in names]


def _row(name: str, *, sized: bool) -> dict[str, Any]:
    from qtdog.models.backbones import KNOWN_BACKBONES
    from qtdog.models.weights import pretraining_of
    from qtdog.training.plugins import origin_of

    known, origin = KNOWN_BACKBONES.get(name), origin_of("backbone", name)
    about = "" if known is None else known.about + (f" (pip install 'qtdog[{known.extra}]')" if known.extra else "")
    if origin is not None:
        return {"name": name, "about": f"plug-in {origin.name}", "pretraining": ""} | (_sizes(name) if sized else {})
    return {"name": name, "about": about, "pretraining": pretraining_of(name)} | (_sizes(name) if sized else {})


def _sizes(name: str) -> dict[str, Any]:
    import torch

    from qtdog.conversion.inspect import estimate_size
    from qtdog.core.errors import ModelError
    from qtdog.models.network import FeaturizerSpec, build_featurizer, input_size

    size = input_size(name)
    try:
        with torch.device("meta"):
            featurizer = build_featurizer(FeaturizerSpec(name, 3, size or 224))
        found = estimate_size(featurizer, bits=BITS, exclude=())
    except (ModelError, RuntimeError):  # an extra is missing, or it needs values while it is built
        return {}
    sizes = {"n_parameters": found.n_parameters, "float32_bytes": found.float32_bytes}
    return sizes | {f"{BITS}bit_bytes": found.packed_bytes, "image_size": size}


def _cells(row: dict[str, Any]) -> list[str]:
    saw = row["pretraining"].partition(" (")[0] or "nothing: random only"
    if row["about"].startswith("plug-in "):
        saw = row["about"]
    if "n_parameters" not in row:
        return [row["name"], NO_SIZE, NO_SIZE, saw]
    return [row["name"], f"{row['n_parameters'] / 1e6:.2f} M", f"{row[f'{BITS}bit_bytes'] / 1e6:.2f} MB", saw]


class Kind(StrEnum):
    """What can be listed."""

    BACKBONES = "backbones"
    OBJECTIVES = "objectives"
    FEATURE_LAYERS = "feature-layers"
    STEP_RULES = "step-rules"
    AVERAGERS = "averagers"
    AUGMENTATIONS = "augmentations"
    QUANTIZERS = "quantizers"
    PRESETS = "presets"
    OPTIONS = "options"


def _parse_kind(text: str) -> Kind:
    if text == "datasets":
        raise typer.BadParameter("the data sets are listed by: qtdog data list")
    try:
        return Kind(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not one of {', '.join(Kind)}") from None


def listing(
    kind: Annotated[Kind, typer.Argument(help=f"What to list: {', '.join(Kind)}.", parser=_parse_kind, metavar="KIND")],
    pattern: Annotated[str, typer.Argument(help="Only names that contain this text.")] = "",
    *,
    as_json: JsonOutput = False,
) -> None:
    """List the names that options take, or ('options') every value that --set can change.

    Backbones are listed with parameters, size, and what their weights were trained on: those that are tested here, or
    with a pattern every one that contains it.

    Examples:
      qtdog list backbones

      qtdog list backbones resnet

      qtdog list presets

      qtdog list options quantizer
    """
    from qtdog.cli.console import print_json, print_table

    if kind is Kind.BACKBONES:
        show_backbones(pattern.lower(), as_json=as_json)
        return
    rows = [row for row in _rows(kind) if pattern.lower() in row[0].lower()]
    if as_json:
        print_json([{"name": name, "about": about} for name, about in rows])
    else:
        print_table([kind.value, "about"], rows)


def _rows(kind: Kind) -> list[list[str]]:
    from qtdog.core.config_io import option_rows, preset_description, preset_names

    if kind is Kind.PRESETS:
        return [[name, preset_description(name)] for name in preset_names()]
    if kind is Kind.OPTIONS:
        return option_rows()
    return _axis(kind)


def _axis(kind: Kind) -> list[list[str]]:
    """Return the members of an axis of the configuration, with the first line of what each says of itself."""
    from qtdog.training.plugins import load_entry_points, member_origins

    load_entry_points()
    origins = member_origins()
    axis = kind.value.removesuffix("s")
    return [
        [name, about + (f" (plug-in {origins[axis, name]})" if (axis, name) in origins else "")]
        for name, about in _members(kind)
    ]


def _members(kind: Kind) -> list[list[str]]:
    # `compose` has imported every member, so that each has entered its name.
    from qtdog.data.augment import AUGMENTATIONS
    from qtdog.models.feature_layers import FEATURE_LAYERS
    from qtdog.quantizers.registry import QUANTIZERS
    from qtdog.training.build import AVERAGERS, OBJECTIVES, STEP_RULES

    if kind is Kind.QUANTIZERS:
        return [["none", "Leave the weights in float."], *([name, QUANTIZERS[name].about] for name in QUANTIZERS)]
    registries: dict[Kind, Registry[Any]] = {
        Kind.OBJECTIVES: OBJECTIVES,
        Kind.FEATURE_LAYERS: FEATURE_LAYERS,
        Kind.STEP_RULES: STEP_RULES,
        Kind.AVERAGERS: AVERAGERS,
        Kind.AUGMENTATIONS: AUGMENTATIONS,
    }
    if kind is Kind.AUGMENTATIONS:
        built_in = [
            ["domainbed", "DomainBed's: crop, flip, jitter of the colors, sometimes grey (the default)."],
            ["none", "The images as they are."],
        ]
        return [*built_in, *([name, _about(AUGMENTATIONS[name])] for name in AUGMENTATIONS)]
    return [[name, _about(registries[kind][name])] for name in registries[kind]]


def _about(member: Any) -> str:
    """Return the first line of a member's docstring, and its hyper-parameters with their defaults."""
    defaults = {name: declared.default for name, declared in getattr(member, "HYPERPARAMETERS", {}).items()}
    values = ", ".join(f"{name}={v:g}" if isinstance(v, float) else f"{name}={v}" for name, v in defaults.items())
    return (member.__doc__ or "").split("\n")[0] + (f" [params: {values}]" if values else "")


SHOWN = ("backbone", "classes", "bits", "dataset", "source_domains", "target_domain", "accuracy", "pretraining", "step")


def inspect_file(
    model: Model,
    *,
    weights: Annotated[bool, typer.Option("--weights", help="List every quantized weight.")] = False,
    as_json: JsonOutput = False,
) -> None:
    """Show the description in a packed model file, and where its bytes go.

    The bound is the entropy of the codes, each weight by its own frequencies, plus all other values as they are.

    Examples:
      qtdog inspect runs/photos-c

      qtdog inspect model.safetensors --weights
    """
    from qtdog.cli.console import print_json
    from qtdog.packing.ensemble_file import is_ensemble
    from qtdog.packing.reader import read_layout
    from qtdog.packing.sizes import ensemble_sizes, file_sizes
    from qtdog.runs.find import find_model

    path = find_model(model)
    size = asdict(ensemble_sizes(path) if is_ensemble(path) else file_sizes(path))
    layout = read_layout(path)[1]
    rows = _weights(path) if weights else []
    left = _left_in_float(path)
    if as_json:
        print_json(
            {"model": str(path), "metadata": layout.metadata, "size": size, "weights": rows, "left_in_float": left}
        )
        return
    _show(layout, size, left)
    if weights:
        _show_weights(rows)


def _left_in_float(path: Path) -> dict[str, float]:
    """Return the weights of two or more dimensions that the file holds in float, with their share of all its values."""
    from qtdog.packing.packed_file import read_contents
    from qtdog.packing.reader import read_layout

    contents = read_contents(path, read_layout(path)[1])
    rest = {id(value): (name, value) for name, value in contents.rest.items()}.values()
    codes = {id(value): value.codes.numel() for value in contents.quantized.values()}
    n_all = sum(codes.values()) + sum(value.numel() for _, value in rest)
    found = {name: value.numel() / n_all for name, value in rest if value.dim() > 1 and value.is_floating_point()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


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


def _show(layout: Layout, size: dict[str, Any], left: dict[str, float]) -> None:
    from qtdog.cli.console import print_table

    about, ensemble = layout.metadata, layout.metadata.get("ensemble")
    kind = f"ensemble of {size['n_members']}" if ensemble else "one model"
    rows = [*([name, _text(about[name])] for name in SHOWN if name in about)]
    one = " of one member" if ensemble else ""
    rows += [
        ["file", f"{size['bytes']:,} bytes"],
        [f"float32{one}", f"{size['float32_bytes']:,} bytes, {size['ratio']:.2f} times the file"],
        ["bits per code", f"{size['bits_per_code']:.3f}, their entropy {size['entropy_bits_per_code']:.3f}"],
        ["file ÷ bound", f"{size['over_entropy']:.3f}"],
    ]
    if layout.quantized and left:
        listed = ", ".join(f"{name} ({100 * share:.1f} %)" for name, share in list(left.items())[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        rows.append(["weights in float", f"{100 * sum(left.values()):.1f} % of all values: {listed}{more}"])
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
