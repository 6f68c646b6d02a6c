"""Ask the Hugging Face hub without long waits where there is no network."""

from __future__ import annotations

import contextlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator


def reachable(endpoint: str, timeout: float = 3.0) -> bool:
    """Whether the host of `endpoint` takes a connection; True without asking where a proxy stands between."""
    parts = urllib.parse.urlsplit(endpoint)
    if parts.scheme in urllib.request.getproxies() or not parts.hostname:
        return True
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname, port), timeout=timeout).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def hub_cache_if_offline() -> Iterator[bool]:
    """Inside, hub calls read their cache only if the hub cannot be reached; yields whether it can be.

    The hub's client otherwise tries six times per file, some 25 s each, before it looks into its cache.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    online = not before and reachable(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = not online
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = before
