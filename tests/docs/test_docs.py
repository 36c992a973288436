"""The documentation says only what is true of this version: commands, links, code and configuration."""

import ast
import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
import yaml

from qtdog.api.studies import find_study
from qtdog.core.config_io import build_config, load_preset, parse_assignment, preset_description, preset_names
from qtdog.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
UsageError = typer.BadParameter.__base__ or Exception  # of the click that typer brings
SHELL_WORDS = {"|", "||", "&&", ">", ">>", "<", ";", "&", "#"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    return [match[3] for match in FENCE.finditer(text) if match[2] == language]


def commands(text: str) -> Iterator[str]:
    """Yield every line of a bash block that calls qtdog, continued lines joined."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            call = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
            if call.startswith("qtdog "):
                yield call


def arguments(call: str) -> list[str]:
    words = shlex.split(call, comments=True)[1:]
    end = next(
        (index for index, word in enumerate(words) if word in SHELL_WORDS or word.startswith((">", "2>"))), len(words)
    )
    return words[:end]


def disarm(command: Any) -> Any:
    """Let every command below read its options and then do nothing."""
    for child in getattr(command, "commands", {}).values():
        disarm(child)
    command.callback = lambda **options: None
    return command


@cache
def program() -> Any:
    from qtdog.cli.main import app

    return disarm(typer.main.get_group(app))  # not the one that all tests share


def parse(words: list[str]) -> None:
    """Let the program's own parsers read a command line, without running it."""
    from qtdog.cli.main import take_plugins

    words, _ = take_plugins(words)
    program().main(args=words, prog_name="qtdog", standalone_mode=False)


def check_configuration(words: list[str]) -> None:
    """Build the configuration of the presets and `--set` values in a command line."""
    readers = {"--preset": load_preset, "--set": parse_assignment}
    pairs = list(itertools.pairwise(words))
    build_config([readers[flag](value) for name in readers for flag, value in pairs if flag == name])


def slug(heading: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower())
    return kept.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        if not aim.exists() or (anchor and aim.suffix == ".md" and anchor not in anchors(aim)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_in_the_pages_parses(page: Path):
    for call in commands(page.read_text()):
        try:
            parse(arguments(call))
            check_configuration(arguments(call))
        except Exception as error:
            pytest.fail(f"{call}\n{type(error).__name__}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_inside_the_project_resolves(page: Path):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_python_block_compiles_and_imports_what_exists(page: Path):
    for block in blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "qtdog":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qtdog":
                assert hasattr(importlib.import_module("qtdog"), node.attr), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_yaml_block_is_a_valid_configuration(page: Path):
    for block in blocks(page.read_text(), "yaml"):
        build_config([yaml.safe_load(block)])


def test_the_study_with_expected_values_is_one(tmp_path: Path):
    (block,) = blocks((ROOT / "docs/tasks/reproduce.md").read_text(), "yml")
    study = {
        "name": "mine",
        "methods": {"ERM": {"presets": ["float"]}, "QT-DoG": {}},
        "ensembles": [{"name": "EoQ", "method": "QT-DoG", "kind": "eoq", "members": "0..4"}],
        "grid": {"target": "all", "trial, seed": "0..4"},
    }
    file = tmp_path / "my_study.yaml"
    file.write_text(yaml.safe_dump(study | yaml.safe_load(block)))
    found, dataset = find_study(str(file))
    assert dataset == "PACS"
    assert set(found.expected) == {"ERM", "QT-DoG", "EoQ"}


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_is_valid_and_described(name: str):
    assert build_config([load_preset(name)]).train.steps > 0
    assert preset_description(name).endswith(".")


def nav_files(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, (list, dict)):
        for child in entry.values() if isinstance(entry, dict) else entry:
            yield from nav_files(child)


def test_the_navigation_lists_every_page_and_no_other():
    listed = set(nav_files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_ten_questions_are_answered_by_a_page_and_by_commands_that_parse():
    section = (ROOT / "docs/index.md").read_text().split("## Ten questions")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 10
    for row in rows:
        assert LINK.search(row), row
        calls = [code for code in re.findall(r"`([^`]+)`", row) if code.startswith("qtdog ")]
        assert calls, row
        for call in calls:
            parse(arguments(call))


def test_commands_are_found_in_blocks_and_joined():
    text = "```bash\n$ qtdog list  # all\nmake demo\nqtdog train \\\n  --data x | head\n```\n```text\nqtdog no\n```\n"
    found = list(commands(text))
    assert [arguments(call) for call in found] == [["list"], ["train", "--data", "x"]]


@pytest.mark.parametrize(
    "words",
    [
        "trane",
        "train --no-such-flag",
        "train --data",
        "train --steps many",
        "data",
        "data frobnicate",
        "train left over",
        "eval",
    ],
)
def test_a_wrong_command_is_noticed(words: str):
    with pytest.raises(UsageError):
        parse(words.split())


@pytest.mark.parametrize("words", ["--help", "train --help", "data list", "train --steps 5 --data x --target 15"])
def test_a_right_command_is_let_pass(words: str):
    parse(words.split())


@pytest.mark.parametrize("words", ["train --preset nope", "train --set train.stepz=1", "train --set train.steps=0"])
def test_a_wrong_configuration_is_noticed(words: str):
    parse(words.split())
    with pytest.raises(ConfigError):
        check_configuration(words.split())


def test_a_broken_link_is_noticed(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`\n[a](#one-two) [b](#three) [c](gone.md) [d](page.md#nope) [e](https://example.org)\n")
    assert broken_links(page) == ["#three", "gone.md", "page.md#nope"]
