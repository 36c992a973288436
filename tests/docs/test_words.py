"""Pages, help and options speak the field's language: no word of a private one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from qtdog.cli.main import app
from qtdog.core.config_io import option_rows, preset_description, preset_names

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# what the glossary of docs/architecture.md has another word for
FORBIDDEN = re.compile(
    r"\b(crews?|nurser(y|ies)|seats?|companions?|doubts?|exams?|unseen places?|artefacts?|datasheets?|ships?|shipped|"
    r"voices?|taught|buried|bury|held-out parts?|watchers?|sheets?|doors?|on board|shared beginnings?|"
    r"colours?|favours?|behaviours?|normalis\w+|regularis\w+|quantis\w+|optimis\w+|initialis\w+)\b",
    re.IGNORECASE,
)

OF_OTHER_PROGRAMS = {"--head", "--num_processes"}  # of ray and accelerate


def help_texts(command: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield where and what a command and those below it say in `--help`."""
    yield name, command.help or ""
    yield from ((f"{name} {option.name}", getattr(option, "help", None) or "") for option in command.params)
    for child, below in getattr(command, "commands", {}).items():
        yield from help_texts(below, f"{name} {child}")


def forbidden(texts: Iterator[tuple[str, str]]) -> list[str]:
    """Return where a forbidden word stands, and which."""
    return [f"{where}: {found[0]}" for where, text in texts if (found := FORBIDDEN.search(text))]


def test_pages():
    lines = (
        (f"{page.relative_to(ROOT)}:{number}", line)
        for page in PAGES
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    )
    assert forbidden(lines) == []


def test_pages_that_the_program_writes():
    assets = [path for room in ("report", "export") for path in (ROOT / "src/qtdog" / room / "assets").iterdir()]
    assert len(assets) >= 7
    assert forbidden((path.name, path.read_text(encoding="utf-8")) for path in assets) == []


def sentences(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of the strings of a module that a user can meet: no docstrings, no names."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in docstrings:
            continue
        if isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def test_messages():
    package = ROOT / "src" / "qtdog"
    texts = [
        (f"{path.relative_to(package)}:{line}", text)
        for path in sorted(package.rglob("*.py"))
        for line, text in sentences(path.read_text(encoding="utf-8"))
    ]
    assert len(texts) > 2000
    assert forbidden(iter(texts)) == []


def options(command: Any) -> Iterator[str]:
    """Yield the names of the options of a command and of those below it."""
    for option in command.params:
        yield from (*option.opts, *option.secondary_opts)
    for child in getattr(command, "commands", {}).values():
        yield from options(child)


def test_options_that_messages_name_exist():
    known = {"--plugin", "--help", "--version", *options(typer.main.get_command(app)), *OF_OTHER_PROGRAMS}
    package = ROOT / "src" / "qtdog"
    named = {
        (path.name, flag)
        for path in package.rglob("*.py")
        for _, text in sentences(path.read_text(encoding="utf-8"))
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", text)
    }
    assert len(named) > 50
    assert {(file, flag) for file, flag in named if flag not in known} == set()


def test_help_of_every_command():
    texts = list(help_texts(typer.main.get_command(app), "qtdog"))
    assert len(texts) > 200
    assert forbidden(iter(texts)) == []


def test_options_and_presets():
    options = ((name, about) for name, about in option_rows())
    assert forbidden(options) == []
    assert forbidden((name, preset_description(name)) for name in preset_names()) == []


def test_a_forbidden_word_is_found():
    assert forbidden(iter([("here", "the Crew trains"), ("there", "leadership of colors")])) == ["here: Crew"]
    assert forbidden(iter([("a", "in colour"), ("b", "the colours")])) == ["a: colour", "b: colours"]
    assert [text for _, text in sentences('"""on board"""\nx = f"no doubt {y}", "crew"\n')] == ["no doubt "]
