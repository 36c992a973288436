"""The page on methods has a table made from the registries; run this file to write it anew."""

import re
from pathlib import Path
from typing import Any

from qtdog.core.registry import HyperParameter, Registry
from qtdog.models.feature_layers import FEATURE_LAYERS
from qtdog.training.build import AVERAGERS, OBJECTIVES, STEP_RULES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "methods-in-detail.md"
AXES: dict[str, Registry[Any]] = {
    "objective": OBJECTIVES,
    "feature layer": FEATURE_LAYERS,
    "step rule": STEP_RULES,
    "averager": AVERAGERS,
}
HEAD = "| name | axis | what it does | hyper-parameters | cost per step |"


def with_table(page: str) -> str:
    """Return the page with its table made from the registries; measured costs are kept by name."""
    before, _, rest = page.partition(HEAD)
    table, _, after = rest.partition("\n\n")
    costs = {cells[1].strip(" `"): cells[-2].strip() for line in table.splitlines() if (cells := line.split("|"))[3:]}
    rows = [
        f"| `{name}` | {axis} | {about(registry[name])} | {parameters(registry[name])} | {costs.get(name, '')} |"
        for axis, registry in AXES.items()
        for name in registry
        if name != "none" and registry[name].__module__.startswith("qtdog.")  # another test may have plugged one in
    ]
    text = "\n".join([HEAD, "| --- | --- | --- | --- | --- |", *rows]).replace("|  |", "| |")
    return f"{before}{text}\n\n{after}"


def about(member: Any) -> str:
    """Return the first line of a docstring without its full stop."""
    return (member.__doc__ or "").split("\n")[0].removesuffix(".").replace("|", "\\|")


def parameters(member: Any) -> str:
    """Return the hyper-parameters with default and range of the random search."""
    return ", ".join(f"`{name}` {_values(how)}" for name, how in member.HYPERPARAMETERS.items())


def _values(how: HyperParameter) -> str:
    search = "" if how.search is None else f" ({_number(how.search[0])} to {_number(how.search[1])})"
    return (_number(how.default) if isinstance(how.default, float) else str(how.default)) + search


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def test_the_table_is_made_from_the_registries():
    page = PAGE.read_text()
    assert page == with_table(page), "write the table anew with: python tests/docs/test_methods_page.py"


def test_the_page_names_the_objectives_that_work_in_one_process():
    sentence = (
        (DOCS / "tasks/methods.md").read_text().split("## Several processes\n")[1].split("work in one process")[0]
    )
    assert set(re.findall(r"`(\w+)`", sentence)) == {name for name in OBJECTIVES if OBJECTIVES[name].ONE_PROCESS}


def test_the_page_that_chooses_names_every_method():
    named = set(re.findall(r"`([\w-]+)`", (DOCS / "tasks/methods.md").read_text()))
    names = {name for registry in AXES.values() for name in registry if registry[name].__module__.startswith("qtdog.")}
    assert names - {"none", "plain"} <= named


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
