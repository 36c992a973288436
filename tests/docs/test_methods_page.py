"""The page on methods says of each member what the registries say."""

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from qtdog.core.registry import Registry
from qtdog.models.feature_layers import FEATURE_LAYERS
from qtdog.training.build import AVERAGERS, OBJECTIVES, STEP_RULES

PAGE = (Path(__file__).parents[2] / "docs/tasks/methods.md").read_text()
AXES: dict[str, Registry[Any]] = {
    "objective": OBJECTIVES,
    "feature layer": FEATURE_LAYERS,
    "step rule": STEP_RULES,
    "averager": AVERAGERS,
}
MEMBERS = [(axis, name) for axis, registry in AXES.items() for name in registry if name != "none"]


def table() -> dict[tuple[str, str], str]:
    """(axis, name) to the cell of its hyper-parameters."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {(row[1], row[0].strip("`")): row[4] for row in rows}


def number(text: str) -> float:
    """Read 0.1, 1/3 or 10⁵."""
    if text.startswith("10") and len(text) == 3 and text[2] in "³⁴⁵":
        return 10.0 ** "⁰¹²³⁴⁵".index(text[2])
    return float(Fraction(text))


def test_the_table_has_every_member_once():
    assert sorted(table()) == sorted(MEMBERS)


@pytest.mark.parametrize(("axis", "name"), MEMBERS)
def test_hyper_parameters_have_their_defaults_and_ranges(axis: str, name: str):
    found = re.findall(r"`(\w+)` ([^\s,]+)(?: \((\S+) to (\S+)\))?", table()[axis, name])
    known = AXES[axis][name].HYPERPARAMETERS
    assert [row[0] for row in found] == list(known)
    for key, default, low, high in found:
        how = known[key]
        assert (default if how.choices else pytest.approx(number(default))) == how.default, key
        assert (tuple(map(number, (low, high))) if low else None) == how.search, key


def test_the_page_names_the_objectives_that_work_in_one_process():
    sentence = PAGE.split("## Several processes\n")[1].split("work in one process")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == {name for name in OBJECTIVES if OBJECTIVES[name].ONE_PROCESS}
