"""Waiting for a grid."""

from __future__ import annotations

import threading
import time


def running(fakes, *names):
    def check():
        try:
            return all((fakes.folder / "cells" / name / "log.jsonl").exists() for name in names)
        except OSError:
            return False

    return check


def when(condition, then, *, within: float = 30.0) -> threading.Thread:
    """Calls ``then`` from another thread as soon as ``condition`` holds."""

    def watch():
        end = time.monotonic() + within
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread
