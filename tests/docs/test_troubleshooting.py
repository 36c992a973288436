"""Each message on the page of troubleshooting is one of the program's."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/troubleshooting.md"


def texts(source: str) -> list[str]:
    """Return the strings of a module that are no docstrings, formatted ones with {} for their values."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found.append(node.value)
    return found


def test_docstrings_are_no_messages():
    assert texts('"""not this"""\nx = f"a {b} c"\n') == ["a {} c", "a ", " c"]


def test_every_message_of_the_page_is_one_of_the_program():
    known = "\n".join(text for path in (ROOT / "src").rglob("*.py") for text in texts(path.read_text()))
    named = re.findall(r"^\| `([^`]+)`", PAGE.read_text(), re.MULTILINE)
    assert len(named) > 40
    assert [message for message in named if message not in known] == []
