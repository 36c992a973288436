"""Errors that a user can act on, the nearest match for a mistyped name, and optional libraries (extras)."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class QtdogError(Exception):
    r"""Base of every error that qtdog raises on purpose; its text says what to do.

    The command line prints the text alone (no traceback) and exits with `exit_code`. File names that are not UTF-8 are
    shown with `\xNN` for each odd byte, so that the text can be written anywhere.
    """

    exit_code: int = 1

    def __str__(self) -> str:
        """Return the text."""
        return _writable(super().__str__())


def _writable(text: str) -> str:
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a pair, which no file name holds
        return text.encode("utf-8", "backslashreplace").decode()


class ConfigError(QtdogError):
    """An option has an unknown name or a value that it cannot take."""

    exit_code = 2


class DataError(QtdogError):
    """A data set is missing, incomplete or unreadable."""


class ModelError(QtdogError):
    """A backbone or its weights cannot be had or do not fit."""


class FormatError(QtdogError):
    """A file is not what it should be: truncated, hostile, or of another kind."""


class RunError(QtdogError):
    """A run folder cannot be used, or a run had to stop."""


class FolderInUseError(RunError):
    """Another process holds a run folder."""


class NonFiniteLossError(RunError):
    """The training loss became NaN or infinite; the last good state was kept."""


class CollapseError(RunError):
    """A quantized run fell to chance and was stopped; the state was kept.

    Attributes:
        report: what was measured, for `diagnosis.json`.
    """

    def __init__(self, text: str, report: dict[str, Any]) -> None:
        super().__init__(text)
        self.report = report


class Interrupted(QtdogError):
    """A signal asked the run to stop; its state was saved first."""

    exit_code = 130


def nearest(given: str, known: Iterable[str]) -> str | None:
    """Return the known name closest in spelling to `given`, or None if none is close.

    Example:
        >>> nearest("corel", ["coral", "erm"])
        'coral'
    """
    names = list(known)
    folded = {name.lower(): name for name in names}
    match = difflib.get_close_matches(given.lower(), folded, n=1, cutoff=0.5)
    return folded[match[0]] if match else None


def unknown(kind: str, given: str, known: Iterable[str]) -> str:
    """Return the sentence for an unknown name, with the nearest match and what is known.

    Example:
        >>> unknown("objective", "emr", ["erm"])
        "unknown objective 'emr'; did you mean 'erm'? Known: erm"

    Names that look alike are shown with their codes.
    """
    names = sorted(known)
    close = nearest(given, names)
    if close and unicodedata.normalize("NFKC", close) == unicodedata.normalize("NFKC", given):
        return f"unknown {kind} {given!a}, which only looks like {close!a}: take that"
    hint = f"; did you mean '{close}'?" if close else "."
    listed = ", ".join(names[:20]) + (f" … ({len(names)} in all)" if len(names) > 20 else "")
    return f"unknown {kind} '{given}'{hint} Known: {listed or 'none'}"


@contextmanager
def extra(name: str, need: str, kind: type[QtdogError] = ModelError) -> Iterator[None]:
    """Import inside this, so that a missing library is named together with the command that installs it.

    Args:
        name: of the extra in `pyproject.toml`.
        need: who needs what, like "class-activation maps need grad-cam".
        kind: of the error.

    Raises:
        QtdogError: of that kind; the library is not installed, or does not import.

    Example:
        >>> with extra("ray", "this needs Ray"):
        ...     import no_such_library
        Traceback (most recent call last):
        qtdog.core.errors.ModelError: this needs Ray: pip install 'qtdog[ray]' (No module named 'no_such_library')
    """
    try:
        yield
    except ImportError as error:
        raise kind(f"{need}: pip install 'qtdog[{name}]' ({error})") from error
