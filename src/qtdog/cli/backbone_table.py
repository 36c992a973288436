"""What `qtdog list backbones` says of each backbone: parameters, size, and what its weights were trained on."""

from __future__ import annotations

from typing import Any

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
    from qtdog.models.backbones import KNOWN, backbone_names

    names = list(KNOWN)
    if pattern:
        names = [name for name in {**KNOWN, **dict.fromkeys(backbone_names())} if pattern in name.lower()]
    return [_row(name, sized=len(names) <= MAX_MEASURED) for name in names]


def _row(name: str, *, sized: bool) -> dict[str, Any]:
    from qtdog.models.backbones import KNOWN
    from qtdog.models.weights import pretraining_of

    known = KNOWN.get(name)
    about = "" if known is None else known.about + (f" (pip install 'qtdog[{known.extra}]')" if known.extra else "")
    return {"name": name, "about": about, "pretraining": pretraining_of(name)} | (_sizes(name) if sized else {})


def _sizes(name: str) -> dict[str, Any]:
    import torch

    from qtdog.conversion.inspect import estimate_size
    from qtdog.core.errors import ModelError
    from qtdog.models.featurizers import FeaturizerSpec, build_featurizer, input_size

    size = input_size(name)
    try:
        with torch.device("meta"):
            featurizer = build_featurizer(FeaturizerSpec(name, 3, size or 224))
        found = estimate_size(featurizer, bits=BITS, exclude=())
    except (ModelError, RuntimeError, NotImplementedError):  # an extra is missing, or it needs values while it is built
        return {}
    sizes = {"n_parameters": found.n_parameters, "float32_bytes": found.float32_bytes}
    return sizes | {f"{BITS}bit_bytes": found.packed_bytes, "image_size": size}


def _cells(row: dict[str, Any]) -> list[str]:
    saw = row["pretraining"].partition(" (")[0] or "nothing: random only"
    if "n_parameters" not in row:
        return [row["name"], NO_SIZE, NO_SIZE, saw]
    return [row["name"], f"{row['n_parameters'] / 1e6:.2f} M", f"{row[f'{BITS}bit_bytes'] / 1e6:.2f} MB", saw]
