"""The page on quantizers says of each member what the registry says, and its numbers are those that one measures."""

import re
from pathlib import Path

import pytest
import torch

from qtdog.core.config import AFTER_TRAINING
from qtdog.core.config_io import load_preset, preset_names
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import OPTION_NAMES, QuantizerOptions, encode
from qtdog.quantizers.inq import INQ
from qtdog.quantizers.registry import QUANTIZERS
from qtdog.quantizers.step_size_init import STEP_SIZE_INITS, initial_scale

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "tasks/quantizers.md").read_text()
DETAIL = (DOCS / "quantizers-in-detail.md").read_text()


def section(heading: str, page: str = PAGE) -> str:
    return page.split(f"## {heading}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w-]+)`", cell)


def test_the_table_of_members_is_the_registry():
    table = {names(cells[0])[0]: cells for cells in rows(section("All members", DETAIL))}
    assert {"none", *QUANTIZERS} <= set(table) <= {"none", *QUANTIZERS, *AFTER_TRAINING}
    for name in QUANTIZERS:
        assert set(names(table[name][3])) == QUANTIZERS[name].reads, name


def test_the_table_of_controls_names_presets_and_leaves_none_out():
    table = rows(section("What each control separates", DETAIL))
    mentioned = [name for cells in table for name in names(" ".join(cells[1:]))]
    controls = {name for name in preset_names() if set(load_preset(name)) <= {"quantizer", "optimizer"}}
    assert set(mentioned) - set(OPTION_NAMES) == controls


@pytest.fixture(scope="module")
def gaussian() -> torch.Tensor:
    return torch.randn(64, 1152, generator=torch.Generator().manual_seed(0))


def test_the_strengths_of_the_starts_are_measured(gaussian: torch.Tensor):
    heading = "Where step sizes start: the strength of the regularization"
    table = {names(cells[0])[0]: cells[1:6] for cells in rows(section(heading, DETAIL))}
    assert set(table) == set(STEP_SIZE_INITS)
    for init, given in table.items():
        for bits, number in zip((8, 7, 6, 5, 4), given, strict=True):
            spec = QuantSpec(bits)
            value = encode(gaussian, initial_scale(gaussian, spec, init), spec)
            assert (value.dequantize() - gaussian).std().item() == pytest.approx(float(number), abs=0.001), (init, bits)


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_the_strength_of_inq_is_measured(gaussian: torch.Tensor, bits: int):
    inq = INQ(gaussian, QuantSpec(bits), QuantizerOptions(stages=(1.0,)))
    inq.enable_(gaussian)
    error = inq(gaussian) - gaussian
    assert error.std().item() == pytest.approx(0.19, abs=0.005)
    if bits > 5:
        assert (error / gaussian).square().mean().sqrt().item() == pytest.approx(0.2, abs=0.01)
