"""The pages that are made: the API reference has every name, the CLI reference every command."""

import importlib
import re
import runpy
from pathlib import Path

import pytest
import typer.main

import qtdog
from qtdog.cli.main import app

ROOT = Path(__file__).parents[2]
HOOKS = runpy.run_path(str(ROOT / "docs/make/hooks.py"))
REFERENCE = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
RENDERED = re.findall(r"^::: ([\w.]+)$", REFERENCE, re.MULTILINE)
BASES = ["Objective", "StepRule", "Averager", "Quantizer", "FeatureLayer"]  # of the axes that are classes


def found(path: str) -> object:
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ImportError:
        return getattr(importlib.import_module(module), name)


def test_the_api_reference_renders_every_public_name():
    rendered = [found(path) for path in RENDERED]
    missing = [
        name for name in qtdog.__all__ if name not in ("__version__", "sweep") if getattr(qtdog, name) not in rendered
    ]
    assert missing == []
    assert "qtdog.api.studies.sweep" in RENDERED  # `qtdog.sweep` is a package that is called like this function
    assert "`qtdog.__version__`" in REFERENCE
    assert all(getattr(qtdog, name) in rendered for name in BASES)


def test_the_cli_reference_has_every_command_and_option():
    page = "\n".join(HOOKS["command_pages"]())
    root = typer.main.get_command(app)
    for name, command in vars(root)["commands"].items():
        if command.hidden:
            continue
        assert f"qtdog {name}" in page, name
        for option in command.params:
            assert option.hidden or option.opts[-1] in page or option.param_type_name == "argument", option.opts
    assert "## qtdog analyze flatness" in page
    assert "qtdog analyse" not in page  # an earlier spelling, hidden


def test_the_examples_of_the_cli_reference_parse():
    names = runpy.run_path(str(ROOT / "tests/docs/test_docs.py"))
    calls = list(names["commands"]("\n".join(HOOKS["command_pages"]())))
    assert len(calls) > 40
    for call in calls:
        try:
            names["parse"](names["arguments"](call))
        except Exception as error:
            pytest.fail(f"{call}\n{type(error).__name__}: {error}")
