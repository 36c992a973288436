"""`qtdog list`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from qtdog.core.registry import Registry


class Kind(StrEnum):
    """What can be listed."""

    BACKBONES = "backbones"
    OBJECTIVES = "objectives"
    FEATURE_LAYERS = "feature-layers"
    STEP_RULES = "step-rules"
    AVERAGERS = "averagers"
    QUANTIZERS = "quantizers"
    PRESETS = "presets"
    DATASETS = "datasets"
    OPTIONS = "options"


def listing(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    pattern: Annotated[str, typer.Argument(help="Only names that contain this text.")] = "",
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
    from qtdog.cli.backbone_table import show_backbones
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
    if kind is Kind.DATASETS:
        from qtdog.data.cards import CARDS

        return [[name, CARDS[name].title] for name in CARDS]
    return _axis(kind)


def _axis(kind: Kind) -> list[list[str]]:
    """Return the members of an axis of the configuration, with the first line of what each says of itself."""
    # `compose` has imported every member, so that each has entered its name.
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
    }
    return [[name, _about(registries[kind][name])] for name in registries[kind]]


def _about(member: Any) -> str:
    """Return the first line of a member's docstring, and its hyper-parameters with their defaults."""
    defaults = {name: how.default for name, how in member.HYPERPARAMETERS.items()}
    values = ", ".join(f"{name}={v:g}" if isinstance(v, float) else f"{name}={v}" for name, v in defaults.items())
    return (member.__doc__ or "").split("\n")[0] + (f" [params: {values}]" if values else "")
