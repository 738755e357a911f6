"""The Hugging Face hub: whether it answers, asked once and quickly, and its data sets."""

from __future__ import annotations

import functools
import os
import socket
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants

from duallora.errors import DataError, first_line

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")  # of the files that can be read instead
_LOCAL = f"a local file ({', '.join(SUFFIXES)}) or, for a task, the folder of its data (--data-dir, DUALLORA_DATA)"


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


@functools.lru_cache(maxsize=8)
def load_hub(name: str, config: str | None, revision: str | None = None) -> Any:
    """All splits of a hub data set. Raises DataError where the hub cannot be reached or does not have it."""
    import datasets

    label = f"{name}:{config}" if config else name
    if not reachable() and not constants.HF_HUB_OFFLINE:
        raise DataError(
            f"data set {label}: the hub cannot be reached from here. Check the network, give {_LOCAL}, or set "
            "HF_HUB_OFFLINE=1 to use a copy loaded before."
        )
    try:
        return datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # the hub client, fsspec and datasets raise many kinds; each means "not from the hub"
        offline = " (HF_HUB_OFFLINE is set, so only copies loaded before are found)" if constants.HF_HUB_OFFLINE else ""
        raise DataError(
            f"data set {label} cannot be loaded from the hub{offline}: {first_line(error)}. Or give {_LOCAL}"
        ) from error
