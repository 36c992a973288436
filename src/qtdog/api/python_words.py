"""Errors in the words of the one who asked: `out=` in Python where the command line says `--output`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

from qtdog.core.errors import QtdogError

Given = ParamSpec("Given")
Result = TypeVar("Result")

ON_COMMAND_LINE: ContextVar[bool] = ContextVar("on_command_line", default=False)
"""Whether a command of the program is running, which speaks of its options."""

RENAMED = {"output": "out", "plugin": "plugins"}
SWITCHES = ("force_target", "resume", "skip_unreadable")
# What follows an option in a sentence and is no value of it.
PROSE = "above|and|are|at|decides?|for|gives|goes|holds|is|makes|means|must|needs|not|or|out|says|takes|tells|that|to|"
PROSE += "trains|with"
COMMAND = r"(?:qtdog|ray|accelerate) [a-z][^;:,'`]*"
SETTING = r"--set (?P<section>\w+)\.(?P<key>\w+)=(?P<setting>\[[^\]]*\]|[^\s,;:()]*[^\s,;:().])"
OPTION = rf"--(?P<name>[a-z]+(?:-[a-z]+)*)(?![\w-])(?: (?P<value>'[^']*'|(?!(?:{PROSE})\b)[^\s,;:()']*[^\s,;:().']))?"
SAID = r"--[a-z-]+(?: [^\s()]+)? \(in Python (?P<said>[^)]*)\)"  # a message that says both
SPOKEN = re.compile(rf"{COMMAND}|{SAID}|{SETTING}|{OPTION}")


def python_words(text: str) -> str:
    """Return a message with the options of the command line as arguments of Python; whole commands stay.

    Example:
        >>> python_words("Choose another --output, or use --weights none (--lr 1e-05), --resume goes on.")
        "Choose another out=, or use weights='none' (lr=1e-05), resume=True goes on."
        >>> python_words("Add --set model.freeze_bn=true, or name it: --plugin a.py. See 'qtdog train --help'")
        "Add model={'freeze_bn': True}, or name it: plugins=['a.py']. See 'qtdog train --help'"
    """
    return SPOKEN.sub(_in_python, text)


def _in_python(found: re.Match[str]) -> str:
    if found["said"]:
        return found["said"]
    if found["section"]:
        return f"{found['section']}={{'{found['key']}': {_literal(found['setting'])}}}"
    if not found["name"]:
        return found[0]
    name, value = found["name"].replace("-", "_"), found["value"]
    name = RENAMED.get(name, name)
    if value is None:
        return f"{name}=True" if name in SWITCHES else f"{name}="
    if name in SWITCHES:
        return f"{name}=True {value}"
    return f"{name}=[{_literal(value)}]" if name == "plugins" else f"{name}={_literal(value)}"


def _literal(value: str) -> str:
    if value.startswith("["):
        return "[" + ", ".join(_literal(part.strip()) for part in value[1:-1].split(",")) + "]"
    if value in ("true", "false"):
        return value.capitalize()
    is_number = re.fullmatch(r"-?[\d.]+(e-?\d+)?", value) is not None
    return value if is_number or value.startswith("'") else repr(value)


def in_python(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let a function of the Python interface raise errors that name its arguments, unless a command calls it."""

    @functools.wraps(function)
    def asked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except (QtdogError, KeyboardInterrupt) as error:
            if error.args and isinstance(error.args[0], str) and not ON_COMMAND_LINE.get():
                error.args = (python_words(error.args[0]), *error.args[1:])
            raise

    return asked
