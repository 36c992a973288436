"""Running the program in this process, as a user would."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from qtdog.cli.main import main


class Outcome(NamedTuple):
    """What a command left: exit code, standard output and standard error (each error on one line)."""

    code: int
    out: str
    err: str


@pytest.fixture
def qtdog(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Return a function that runs `qtdog ARGS…`."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["qtdog", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
