"""One short try of the Hugging Face hub: without a network its cache counts alone, at once instead of after retries."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from huggingface_hub import constants

CLIENTS = ("httpx", "huggingface_hub", "requests", "urllib")  # whose errors are of the network
TIMEOUT_S = 3.0
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy")


def hub_host() -> str:
    """Return the name of the hub's machine, like huggingface.co."""
    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT


def hub_answers() -> bool:
    """Return whether the hub's machine takes a connection within three seconds; behind a proxy that is assumed."""
    if any(os.environ.get(name) for name in PROXIES):
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((hub_host(), port), TIMEOUT_S).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def short_try(answers: Callable[[], bool] = hub_answers) -> Iterator[bool]:
    """Yield whether the hub answers; inside the block its clients use their cache alone if it does not.

    Args:
        answers: asks the hub.

    Example:
        >>> with short_try(lambda: False) as is_there:
        ...     is_there, constants.HF_HUB_OFFLINE
        (False, True)
    """
    before = constants.HF_HUB_OFFLINE
    is_there = not before and answers()
    constants.HF_HUB_OFFLINE = not is_there
    try:
        yield is_there
    finally:
        constants.HF_HUB_OFFLINE = before


def reason_of(error: Exception, is_there: bool) -> str:
    """Return in a few words why something could not be fetched."""
    of_network = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in CLIENTS
    if not is_there and of_network:
        return f"{hub_host()} does not answer, and the cache does not have them"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
