"""The house rules, each a pure function over source text, each shown to catch what it is for."""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
VERSION = "qtdog.__version__"  # the one value that is at home in an __init__

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
Rule = Callable[[str], list[str]]


def is_module(dotted: str) -> bool:
    return (SOURCE / f"{dotted.replace('.', '/')}.py").is_file()


def is_package(dotted: str) -> bool:
    return (SOURCE / dotted.replace(".", "/") / "__init__.py").is_file()


def package_imports(source: str) -> list[str]:
    """Imports of a name out of a package's `__init__` instead of out of the module that defines it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if is_package(alias.name)]
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"relative import of {node.module}")
        elif isinstance(node, ast.ImportFrom) and node.module and is_package(node.module):
            imported = (f"{node.module}.{alias.name}" for alias in node.names)
            names = [name.rpartition(".")[2] for name in imported if not is_module(name) and name != VERSION]
            found += [f"from {node.module} import {name}" for name in names]
    return found


def is_setter(function: Function) -> bool:
    """Whether it sets a property, whose getter has the docstring."""
    return any(isinstance(one, ast.Attribute) and one.attr == "setter" for one in function.decorator_list)


def public_nodes(tree: ast.Module) -> Iterator[Definition]:
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (
                item
                for item in node.body
                if isinstance(item, Function) and not item.name.startswith("_") and not is_setter(item)
            )


def without_docstring(source: str) -> list[str]:
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) else ["the module"]
    return missing + [node.name for node in public_nodes(tree) if not ast.get_docstring(node)]


def code_in_init(source: str) -> list[str]:
    tree = ast.parse(source)
    return [] if ast.get_docstring(tree) and len(tree.body) == 1 else ["more or less than one docstring"]


# put together here, so that this file is not a finding of its own
HOMES = re.compile(r"(?<![\w.])(?:" + "|".join(["/ho" + "me/", "/Us" + "ers/", "/ro" + "ot/", "/wo" + "rk/"]) + r")\w")


def home_paths(source: str) -> list[str]:
    """Absolute paths of one machine."""
    return [line.strip() for line in source.splitlines() if HOMES.search(line)]


BAD: list[tuple[Rule, str, list[str]]] = [
    (package_imports, "from qtdog.core import ConfigError\n", ["from qtdog.core import ConfigError"]),
    (package_imports, "def f():\n    import qtdog.core\n", ["import qtdog.core"]),
    (package_imports, "from .errors import ConfigError\n", ["relative import of errors"]),
    (package_imports, "from qtdog import load\n", ["from qtdog import load"]),
    (without_docstring, "x = 1\n", ["the module"]),
    (without_docstring, '"""M."""\nclass A:\n    def b(self): pass\ndef c(): pass\n', ["A", "b", "c"]),
    (code_in_init, '"""M."""\nfrom os import path\n', ["more or less than one docstring"]),
    (code_in_init, "", ["more or less than one docstring"]),
    (home_paths, "see /ho" + "me/me/x for it\n", ["see /ho" + "me/me/x for it"]),
]
GOOD: list[tuple[Rule, str]] = [
    (
        package_imports,
        "from qtdog.core import errors\nfrom qtdog.core.errors import ConfigError\nfrom torch import nn\n",
    ),
    (without_docstring, '"""M."""\nclass _A:\n    def b(self): pass\ndef _c(): pass\n'),
    (code_in_init, '"""M."""\n'),
    (home_paths, "https://example.org/ho" + "me/x and ../work/x\n"),
]


@pytest.mark.parametrize(("rule", "source", "findings"), BAD)
def test_a_rule_catches_what_it_is_for(rule: Rule, source: str, findings: list[str]):
    assert rule(source) == findings


@pytest.mark.parametrize(("rule", "source"), GOOD)
def test_a_rule_lets_pass_what_is_allowed(rule: Rule, source: str):
    assert rule(source) == []


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


CODE_IN_INIT = ("qtdog", "sweep")  # the names of the library; a package that is called like its function


def package_inits() -> list[Path]:
    return [path for path in python_files("src") if path.name == "__init__.py" and path.parent.name not in CODE_IN_INIT]


def text_files() -> list[Path]:
    """Every text file of the project: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:  # an archive of the sources has no history: look at the folders that are always there
        return python_files("src", "tests", "benchmarks") + sorted((ROOT / "docs").rglob("*.md"))
    files = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in files if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


@pytest.mark.parametrize(
    ("rule", "paths"),
    [
        (package_imports, python_files("src")),
        (without_docstring, python_files("src")),
        (code_in_init, package_inits()),
        (home_paths, text_files()),
    ],
)
def test_the_house_keeps_its_rules(rule: Rule, paths: list[Path]):
    assert paths
    findings = {str(path.relative_to(ROOT)): rule(path.read_text()) for path in paths}
    assert {path: found for path, found in findings.items() if found} == {}


NOT_OURS = {"base", "registry", "__init__", "__main__"}
# words of style no reader can guess; a name may not be made of one (glossary in docs/architecture.md)
PRIVATE_WORDS = {
    "bury",
    "companion",
    "companions",
    "crew",
    "doors",
    "doubt",
    "nursery",
    "seat",
    "taught",
    "told",
    "voice",
    "watcher",
}


def words_of_names(source: str) -> set[str]:
    """Return the words that names of functions, classes, arguments and variables are made of."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Definition):
            names.append(node.name)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
    return {word.lower() for name in names for word in re.findall(r"[A-Z]?[a-z]+", name)}


def test_words_of_names_are_seen():
    assert words_of_names("class CrewMember:\n    def f(self, old_seat):\n        found_it = 1\n") == {
        "crew", "member", "f", "self", "old", "seat", "found", "it",
    }  # fmt: skip


def test_no_name_is_of_a_private_language():
    found = {
        str(path.relative_to(ROOT)): words_of_names(path.read_text()) & PRIVATE_WORDS for path in python_files("src")
    }
    assert {path: words for path, words in found.items() if words} == {}


def test_a_file_name_stands_once():
    stems = [
        path.stem
        for path in python_files("src")
        if path.stem not in NOT_OURS and path.parent.name not in ("cli", "api")
    ]
    assert sorted(name for name in set(stems) if stems.count(name) > 1) == []


def test_a_public_name_stands_once():
    """Among classes and functions of the layers below `api`; a command may be called like the function that it runs."""
    homes: dict[str, list[str]] = {}
    for path in python_files("src"):
        if path.parent.name in ("cli", "api", "qtdog"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(path.relative_to(SOURCE)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
