"""Running the program in this process, as a user would."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

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


@pytest.fixture(scope="session")
def stdout_of() -> Callable[..., str]:
    """Return a function that runs `qtdog ARGS…` in this process and returns what it prints; for fixtures of modules."""

    def call(*args: object) -> str:
        stream = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stream):
            patch.setattr(sys, "argv", ["qtdog", *map(str, args)])
            with contextlib.suppress(SystemExit):
                main()
        return stream.getvalue()

    return call


@contextlib.contextmanager
def _at_updates(call: Callable[[int], None]) -> Iterator[None]:
    """Call a function behind each update of any network, with how many there were."""
    done = 0

    def hook(*_: object) -> None:
        nonlocal done
        done += 1
        call(done)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture
def ctrl_c_after() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Return what presses Ctrl-C behind the n-th update that is made inside of `with`."""
    return lambda n: _at_updates(lambda done: signal.raise_signal(signal.SIGINT) if done == n else None)


@pytest.fixture
def no_updates() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return what fails the test if anything is trained inside of `with`."""
    return lambda: _at_updates(lambda done: pytest.fail("trained"))
