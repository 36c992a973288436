"""What `qtdog bits` shows: tables, and the command that uses the choice."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtdog.analysis.bit_plan import Candidate, Choice
    from qtdog.analysis.bit_search import LayerChoice


def choice_table(choice: Choice) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows, a row per candidate; the recommended one has a star.

    Example:
        >>> from qtdog.analysis.bit_plan import Trial, choose
        >>> trials = [Trial(4, domain, accuracy, 0.25, 0.1, 1.0, 2000) for domain, accuracy in [("a", 0.5), ("b", 0.7)]]
        >>> choice_table(choose(trials))[1]
        [['4 *', '50.0', '70.0', '60.0 ± 10.0', '0.0 ± 0.0', '0.25 ± 0.07', '0.002 MB']]
    """
    headers = ["bits", *choice.candidates[0].accuracies, "mean", "behind best", "flatness", "file"]
    return headers, [_row(candidate, choice) for candidate in choice.candidates]


def _row(candidate: Candidate, choice: Choice) -> list[str]:
    from qtdog.report.tables import percent

    name = f"{candidate.bits} *" if candidate.bits == choice.bits else str(candidate.bits)
    accuracies = [percent(accuracy) for accuracy in candidate.accuracies.values()]
    if candidate.accuracy is None:
        return [name, *accuracies, "failed", "–", "–", "–"]
    return [
        name,
        *accuracies,
        f"{percent(candidate.accuracy)} ± {percent(candidate.standard_error)}",
        f"{percent(candidate.behind)} ± {percent(candidate.behind_error)}",
        f"{candidate.flatness:.3g} ± {candidate.flatness_error:.1g}",
        f"{(candidate.n_bytes or 0) / 1e6:.3g} MB",
    ]


def layer_table(choice: LayerChoice) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows, a row per layer."""
    rows = [
        [
            " = ".join(layer.names),
            f"{layer.curvature.n_weights:,}",
            f"{layer.curvature.mean:.2e} ± {layer.curvature.standard_error / layer.curvature.n_weights:.0e}",
            f"{choice.cost_of(bits, layer):.2e}",
            str(bits),
        ]
        for layer, bits in zip(choice.layers, choice.bits, strict=True)
    ]
    return ["layer", "weights", "mean curvature", "expected cost", "bits"], rows


def train_line(given: Mapping[str, Any], presets: Sequence[str], choice: int | Mapping[str, int]) -> str:
    """Return the command that uses the choice.

    Args:
        given: the options of `qtdog bits`.
        presets: names or files, in order.
        choice: the number of bits, or those of each layer, which the last preset holds.

    Example:
        >>> train_line({"data": "my photos", "lr": None, "assign": ["train.seed=1"]}, ["pacs-lite"], 6)
        "qtdog train --data 'my photos' --preset pacs-lite --set train.seed=1 --bits 6"
    """
    from qtdog.api.experiment import FLAGS

    words = ["qtdog", "train"]
    for name in FLAGS:
        if given.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(given[name])]
    words += [word for name in presets for word in ("--preset", name)]
    # --set wins over everything, and must not win over the choice
    replaced = "quantizer.bits=" if isinstance(choice, int) else "quantizer.layer_bits="
    assigned = [text for text in given["assign"] or () if not text.startswith(replaced)]
    words += [word for text in assigned for word in ("--set", text)]
    return shlex.join(words + (["--bits", str(choice)] if isinstance(choice, int) else []))
