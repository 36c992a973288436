"""The house rules, each a pure function over source text, each shown to catch what it is for."""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
MAX_FILE_LINES = 300
MAX_BODY_LINES = 40
MAX_NESTING = 3
MAX_POSITIONAL = 5
VERSION = "qtdog.__version__"  # the one value that is at home in an __init__

BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
Rule = Callable[[str], list[str]]


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def long_file(source: str) -> list[str]:
    n_lines = len(source.splitlines())
    return [f"{n_lines} lines"] if n_lines > MAX_FILE_LINES else []


def body_lines(function: Function) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def long_functions(source: str) -> list[str]:
    sized = ((function.name, body_lines(function)) for function in functions(source))
    return [f"{name}: {n_lines} lines" for name, n_lines in sized if n_lines > MAX_BODY_LINES]


def nesting(node: ast.AST) -> int:
    """Depth of blocks inside `node`; `elif` is no deeper than its `if`, and inner functions count for themselves."""
    depths = [0]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        depths.append(nesting(child) + (isinstance(child, BLOCKS) and not is_elif))
    return max(depths)


def deep_nesting(source: str) -> list[str]:
    return [
        f"{function.name}: {nesting(function)}" for function in functions(source) if nesting(function) > MAX_NESTING
    ]


def positional(function: Function) -> list[str]:
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def many_positional(source: str) -> list[str]:
    return [function.name for function in functions(source) if len(positional(function)) > MAX_POSITIONAL]


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


def public_nodes(tree: ast.Module) -> Iterator[Definition]:
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (item for item in node.body if isinstance(item, Function) and not item.name.startswith("_"))


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


def many(line: str, count: int) -> str:
    return "".join(line.format(index) for index in range(count))


BAD: list[tuple[Rule, str, list[str]]] = [
    (long_file, many("x{} = 1\n", 301), ["301 lines"]),
    (long_functions, "def f():\n" + many("    x{} = 1\n", 41), ["f: 41 lines"]),
    (deep_nesting, "def f():\n for a in b:\n  if a:\n   with a:\n    while a: pass\n", ["f: 4"]),
    (many_positional, "def f(a, b, c, d, e, g): pass\n", ["f"]),
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
    (long_file, many("x{} = 1\n", 300)),
    (long_functions, 'def f():\n    """A\n' + many("    {}\n", 50) + '    """\n' + many("    x{} = 1\n", 40)),
    (deep_nesting, "def f():\n if a: pass\n elif b: pass\n elif c: pass\n elif d: pass\n elif e: pass\n"),
    (deep_nesting, "def f():\n for a in b:\n  if a:\n   def g():\n    for c in d:\n     if c: pass\n"),
    (many_positional, "class A:\n    def f(self, a, b, c, d, e, *, g): pass\n"),
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


def package_inits() -> list[Path]:
    return [path for path in python_files("src") if path.name == "__init__.py" and path.parent.name != "qtdog"]


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
        (long_file, python_files("src", "tests", "benchmarks")),
        (long_functions, python_files("src", "tests", "benchmarks")),
        (deep_nesting, python_files("src", "tests", "benchmarks")),
        (many_positional, python_files("src", "benchmarks")),  # a test takes its fixtures by position
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
