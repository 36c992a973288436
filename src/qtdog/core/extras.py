"""Libraries that only some users need: each is an extra of the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qtdog.core.errors import ModelError, QtdogError


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
