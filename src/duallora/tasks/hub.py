"""Whether the Hugging Face hub answers, asked once and quickly."""

from __future__ import annotations

import functools
import os
import socket
from urllib.parse import urlsplit

from huggingface_hub import constants


@functools.cache
def reachable() -> bool:
    """False where HF_HUB_OFFLINE is set or the hub's host cannot be reached within 5 seconds.

    The hub client itself tries five times with growing pauses, for every file: on a machine without a network a
    mistyped name would take most of a minute to be refused.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy can tell
    address = urlsplit(constants.ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True
