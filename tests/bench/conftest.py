"""Nothing here is timed for its figures."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch):
    """Each benchmark collects garbage before its rounds, which takes a second where as much is loaded as here."""
    monkeypatch.setattr(gc, "collect", lambda: 0)
